package policy

import (
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

func TestParse(t *testing.T) {
	p, err := Parse(nil)
	if err != nil || !reflect.DeepEqual(p, Defaults()) {
		t.Errorf("nothing: %v, %+v", err, p)
	}
	for name, text := range map[string]string{
		"yaml": "interval: 30s\ncollect: {window: 20m, memory: 8MiB, classes: [8KiB, 1MiB]}\n" +
			"patterns:\n  disk: {min_accesses: 9, promote: reads > 3}\nbudget: {migrate: 10MiB, wear: 1TiB}\n",
		"json": `{"interval": "30s", "collect": {"window": "20m", "memory": 8388608, "classes": ["8KiB", 1048576]},
			"patterns": {"disk": {"min_accesses": 9, "promote": "reads > 3"}}, "budget": {"migrate": "10MiB", "wear": 1099511627776}}`,
	} {
		p, err := Parse([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := Defaults()
		want.Interval, want.Collect.Window, want.Collect.Memory = 30*time.Second, 20*time.Minute, 8<<20
		want.Collect.Classes = want.Collect.Classes[:2]
		want.Collect.Classes[0], want.Collect.Classes[1] = 8<<10, 1<<20
		disk := DefaultPattern()
		disk.MinAccesses, disk.Promote = 9, "reads > 3"
		want.Patterns["disk"] = disk
		want.Budget = Budget{Migrate: 10 << 20, Wear: 1 << 40}
		if !reflect.DeepEqual(p, want) {
			t.Errorf("%s: %+v\nwant %+v", name, p, want)
		}
		// What is written is read as the same.
		for form, marshal := range map[string]func(any) ([]byte, error){"json": json.Marshal, "yaml": yaml.Marshal} {
			b, err := marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := Parse(b); err != nil || !reflect.DeepEqual(again, p) {
				t.Errorf("%s, written as %s: %v, %+v\n%s", name, form, err, again, b)
			}
		}
	}
}

// What is wrong is refused by its name.
func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"intervall: 30s":                                             "intervall",
		"collect: {windows: 30s}":                                    "windows",
		"patterns: {disk: {min_acesses: 4}}":                         "min_acesses",
		"interval: 11m":                                              "interval: 11m0s",
		"interval: 1ms":                                              "interval: 1ms",
		"collect: {sample: 0}":                                       "collect.sample",
		"hysteresis: {keep: 0}":                                      "hysteresis.keep",
		"hysteresis: {margin: 0.5}":                                  "hysteresis.margin",
		"hysteresis: {gain: .nan}":                                   "hysteresis.gain",
		"hysteresis: {stay: -1s}":                                    "hysteresis.stay",
		"budget: {migrate: -1}":                                      "-1",
		"patterns: {\"\": {}}":                                       "patterns: \"\"",
		"patterns: {disk: {min_accesses: -1}}":                       "patterns.disk.min_accesses",
		"patterns: {disk: {min_random: 2}}":                          "patterns.disk.min_random",
		"patterns: {disk: {max_age: -1s}}":                           "patterns.disk.max_age",
		"patterns: {disk: {min_references: -1}}":                     "patterns.disk.min_references",
		"patterns: {disk: {saves: 0s}}":                              "patterns.disk.saves",
		"patterns: {disk: {write_weight: -1}}":                       "patterns.disk.write_weight",
		"patterns: {disk: {promote: 'reads >'}}":                     "patterns.disk.promote: line 1, column 8",
		"patterns: {disk: {demote: \"reads > 1 &&\\n  speed < 2\"}}": "patterns.disk.demote: line 2, column 3: undeclared reference to 'speed'",
		"patterns: {disk: {promote: reads + writes}}":                "patterns.disk.promote: line 1, column 1: the rule is of type double",
		"patterns: {disk: {promote: reads + 1 > 2}}":                 "patterns.disk.promote: line 1, column 7",
		"patterns: {disk: {promote: '[1].all(x, x > 0)'}}":           "patterns.disk.promote: line 1, column 8",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v\nwant %s", text, err, want)
		}
	}
	p := Defaults()
	p.Budget.Wear = -1
	if err := p.Validate(); err == nil || !strings.HasPrefix(err.Error(), "budget.wear") {
		t.Error(err)
	}
	p = Defaults()
	for i := range maxTypes {
		p.Patterns[strings.Repeat("x", i+1)] = DefaultPattern()
	}
	if p.Validate() == nil {
		t.Error("too many types")
	}
}

// Rules that are too long, deep or costly are refused or fail; none takes long.
func TestRuleLimits(t *testing.T) {
	var wrong *RuleError
	for name, text := range map[string]string{
		"long": strings.Repeat(" ", maxRuleText) + "true",
		"deep": strings.Repeat("(", 200) + "true" + strings.Repeat(")", 200),
	} {
		if _, err := compileRule("r", text); !errors.As(err, &wrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r, err := compileRule("r", `"x" + string(reads) + "`+strings.Repeat("y", 900)+`" == string(writes)`)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := r.holds(&facts{}); ok || err != nil {
		t.Errorf("%t, %v", ok, err)
	}
	r, err = compileRule("r", "references / (references - references) > 0")
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := r.holds(&facts{}); ok || err == nil {
		t.Errorf("a division by zero: %t, %v", ok, err)
	}
}

// Each name that a rule may use means what it should.
func TestRule(t *testing.T) {
	f := facts{
		stat: collect.Stat{Reads: 10, Writes: 5, Runs: 5, Size: 8192, Age: 90 * time.Second},
		attr: Attributes{References: 7}, pinned: true,
	}
	for text, want := range map[string]bool{
		"reads == 10.0 && writes == 5.0 && sequential == 5.0": true,
		"random == 0.75 && size <= 8192":                      true,
		"reads > 9":                                           true,
		"reads + writes > 15.0":                               false,
		"age > duration('1m') && age < duration('2m')":        true,
		"references >= 7 && pinned && !on_flash":              true,
		"references > 7 || on_flash":                          false,
		"!pinned":                                             false,
	} {
		r, err := compileRule("r", text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := r.holds(&f); err != nil || got != want {
			t.Errorf("%s: %t, %v", text, got, err)
		}
	}
	r, err := compileRule("r", "age > duration('1000h')")
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := r.holds(&facts{stat: collect.Stat{Age: math.MaxInt64}}); !ok || err != nil {
		t.Errorf("what was never used: %t, %v", ok, err)
	}
}

func TestDiff(t *testing.T) {
	before, err := Parse([]byte("patterns: {disk: {min_accesses: 9}, old: {}}"))
	if err != nil {
		t.Fatal(err)
	}
	after, err := Parse([]byte("interval: 30s\ncollect: {run: 2MiB}\npatterns: {disk: {min_accesses: 5, promote: pinned}}"))
	if err != nil {
		t.Fatal(err)
	}
	got := Diff(before, after)
	want := []Change{
		{"collect.run", "1MiB", "2MiB"}, {"interval", "15s", "30s"},
		{"patterns.disk.min_accesses", "9", "5"}, {"patterns.disk.promote", "", "pinned"},
	}
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			t.Fatalf("%+v, want first %+v", got, want)
		}
	}
	for _, c := range got[len(want):] {
		if !strings.HasPrefix(c.Name, "patterns.old.") || c.New != "" {
			t.Errorf("%+v", c)
		}
	}
	if len(got) != len(want)+7 || len(Diff(after, after)) != 0 {
		t.Errorf("%d changes, %d without any", len(got), len(Diff(after, after)))
	}
}

// Whatever text is given, it is refused or can be used.
func FuzzParse(f *testing.F) {
	f.Add([]byte("interval: 30s"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		e, err := New(p)
		if err != nil {
			t.Fatalf("what was parsed is refused: %v", err)
		}
		in := testInput(4, 8, func(i int) float64 { return float64(100 * i) })
		for _, m := range e.Step(in) {
			e.Done(m, nil, in.Now)
		}
		if _, err := e.Explain(in, 1, 3); err != nil {
			t.Fatal(err)
		}
	})
}

// Whatever a rule is, it is refused with a place or evaluated in bounded time.
func FuzzRule(f *testing.F) {
	f.Add("reads > 3.0")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := compileRule("r", text)
		var wrong *RuleError
		switch {
		case errors.As(err, &wrong):
			if wrong.Line < 1 || wrong.Column < 1 || wrong.Reason == "" {
				t.Fatalf("%+v", wrong)
			}
		case err != nil:
			t.Fatal(err)
		case r != nil:
			_, _ = r.holds(&facts{stat: collect.Stat{Reads: 3, Age: time.Minute}})
		}
	})
}
