package policy

import (
	"errors"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// other are values that differ from the defaults, for each parameter that there is.
var other = map[string]string{
	"collect.operations": "reads", "collect.sample": "3", "collect.window": "20m0s", "collect.decay": "0.7",
	"collect.classes": "8KiB,1MiB", "collect.run": "2MiB", "collect.pause": "7s", "collect.memory": "32MiB",
	"collect.history": "48MiB", "collect.history_windows": "7", "interval": "30s",
	"patterns.default.min_accesses": "5.5", "patterns.default.min_random": "0.25", "patterns.default.max_request": "64KiB",
	"patterns.default.max_age": "2h0m0s", "patterns.default.min_references": "2", "patterns.default.promote": "reads > 20.0 && references > 1",
	"patterns.default.demote": "writes > reads", "patterns.default.saves": "3ms", "patterns.default.write_weight": "0.5",
	"hysteresis.keep": "0.5", "hysteresis.margin": "2", "hysteresis.gain": "9", "hysteresis.stay": "10m0s",
	"budget.migrate": "64MiB", "budget.wear": "1TiB",
}

// Every field can be set, is shown as it was set, is one change, and is reset.
func TestSetEachParameter(t *testing.T) {
	start := Defaults()
	all := start.Parameters()
	if len(all) != len(other) {
		t.Errorf("%d parameters, and values for %d", len(all), len(other))
	}
	for _, q := range all {
		value, ok := other[q.Name]
		if !ok || value == q.Value || q.Value != q.Default {
			t.Errorf("%+v, to become %q", q, value)
			continue
		}
		p := start.Clone()
		if err := p.Set(q.Name, value); err != nil {
			t.Error(err)
			continue
		}
		if err := p.Validate(); err != nil {
			t.Error(err)
		}
		if got, ok := p.Get(q.Name); !ok || got != value {
			t.Errorf("%s: %q after setting %q", q.Name, got, value)
		}
		if d := Diff(start, p); len(d) != 1 || d[0].Name != q.Name || !slices.Equal(d, Effect(start, p)) {
			t.Errorf("%s: %+v, %+v", q.Name, d, Effect(start, p))
		} else {
			// Diff writes what Set takes.
			again := start.Clone()
			if err := again.Set(q.Name, d[0].New); err != nil || !reflect.DeepEqual(again, p) {
				t.Errorf("%s: %v, %+v", q.Name, err, again)
			}
		}
		if err := p.Reset(q.Name); err != nil || !reflect.DeepEqual(p, start) {
			t.Errorf("%s is not reset: %v, %+v", q.Name, err, p)
		}
	}
	if !reflect.DeepEqual(start, Defaults()) {
		t.Errorf("copies were changed: %+v", start)
	}
	if _, ok := start.Get("patterns.sata.saves"); ok {
		t.Error("a class without a pattern has one")
	}
	if _, ok := start.Get("budget"); ok {
		t.Error("a group has a value")
	}
}

// What is no parameter, or can be no value, is refused by its name.
func TestSetRefused(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"", "1", ": there is no such parameter; there are collect, interval, patterns, hysteresis, budget"},
		{"budget", "1", "budget: it is a group"},
		{"patterns", "1", "patterns: it is a group"},
		{"patterns.default", "1", "patterns.default: there is no such parameter; patterns have min_accesses, "},
		{"patterns.sata.min_acesses", "1", "patterns.sata.min_acesses: there is no such parameter; patterns have min_accesses"},
		{"budget.migrat", "1", "budget.migrat: there is no such parameter; there are migrate, wear"},
		{"budget.migrate.more", "1", "budget.migrate.more: there is no such parameter; budget.migrate is no group"},
		{"budget.migrate", "much", `budget.migrate: "much" is not a size`},
		{"budget.migrate", "-1", `budget.migrate: "-1" is not a size`},
		{"interval", "15", `interval: "15" is not a time such as 90s`},
		{"collect.sample", "1.5", `collect.sample: "1.5" is not a whole number`},
		{"collect.classes", "4K,x", `collect.classes: "x" is not a size`},
		{"hysteresis.keep", "half", `hysteresis.keep: "half" is not a number`},
	} {
		p := Defaults()
		err := p.Set(c.name, c.value)
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s=%s: %v", c.name, c.value, err)
		}
		if !reflect.DeepEqual(p, Defaults()) {
			t.Errorf("%s=%s changed something", c.name, c.value)
		}
	}
	// What has a value that is not possible is for Validate.
	p := Defaults()
	if err := p.Set("hysteresis.keep", "NaN"); err != nil || !math.IsNaN(p.Hysteresis.Keep) || p.Validate() == nil {
		t.Errorf("%v, %+v", err, p)
	}
}

// A class gets a pattern of its own with what it is given, and loses it again.
func TestSetOfAClass(t *testing.T) {
	p := Defaults()
	set := func(name, value string) {
		t.Helper()
		if err := p.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	set("patterns.default.min_accesses", "6")
	before := p.Clone()
	set("patterns.sata.v2.max_age", "2h") // a class with a dot
	if q := p.Patterns["sata.v2"]; q.MinAccesses != 6 || q.MaxAge != 2*time.Hour {
		t.Errorf("%+v", q)
	}
	if d := Diff(before, p); len(d) != len(namesOfPatterns()) {
		t.Errorf("%d changes: %+v", len(d), d)
	}
	if d := Effect(before, p); len(d) != 1 || d[0] != (Change{"patterns.sata.v2.max_age", "1h0m0s", "2h0m0s"}) {
		t.Errorf("%+v", d)
	}
	last := ""
	for _, q := range p.Parameters() {
		if strings.HasPrefix(q.Name, "patterns.") {
			if q.Name == "patterns.sata.v2.min_accesses" && (q.Value != "6" || q.Default != "4" || !strings.HasPrefix(last, "patterns.default.")) {
				t.Errorf("%+v after %s", q, last)
			}
			last = q.Name
		}
	}
	if err := p.Reset("patterns.sata.v2.min_accesses"); err != nil || p.Patterns["sata.v2"].MinAccesses != 4 {
		t.Errorf("%v, %+v", err, p.Patterns)
	}
	if err := p.Reset("patterns.sata.v2"); err != nil || len(p.Patterns) != 1 {
		t.Errorf("%v, %+v", err, p.Patterns)
	}
	for _, name := range []string{"patterns.sata.v2", "patterns.sata.v2.saves"} {
		if err := p.Reset(name); err == nil || !strings.HasPrefix(err.Error(), name+": ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := p.Reset("interva"); err == nil || !strings.HasPrefix(err.Error(), "interva: ") {
		t.Error(err)
	}
	set("budget.migrate", "1M")
	set("budget.wear", "1G")
	if err := p.Reset("budget", "patterns.default"); err != nil || !reflect.DeepEqual(p, Defaults()) {
		t.Errorf("%v, %+v", err, p)
	}
	set("interval", "20s")
	set("patterns.nvme.saves", "1ms")
	if err := p.Reset(); err != nil || !reflect.DeepEqual(p, Defaults()) {
		t.Errorf("%v, %+v", err, p)
	}
}

// namesOfPatterns are the parameters of one pattern.
func namesOfPatterns() (all []string) {
	for name := range other {
		if strings.HasPrefix(name, "patterns.") {
			all = append(all, name)
		}
	}
	return all
}

// Parameters of patterns need no prefix, and with a class there are no others.
func TestFullName(t *testing.T) {
	for _, c := range []struct{ name, typ, want string }{
		{"min_accesses", "", "patterns.default.min_accesses"}, {"promote", "sata", "patterns.sata.promote"},
		{"patterns.sata.promote", "sata", "patterns.sata.promote"}, {"patterns.sata", "sata", "patterns.sata"},
		{"budget.migrate", "", "budget.migrate"}, {"interval", "", "interval"}, {"nonsense", "", "nonsense"},
		{"budget.migrate", "sata", ""}, {"patterns.nvme.promote", "sata", ""}, {"nonsense", "sata", ""},
	} {
		got, err := FullName(c.name, c.typ)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && !strings.HasPrefix(err.Error(), c.name+": ") {
			t.Errorf("%s of %q: %q, %v", c.name, c.typ, got, err)
		}
	}
}

// The place of what is wrong with a rule is pointed at.
func TestPoint(t *testing.T) {
	p := Defaults()
	if err := p.Set("patterns.default.promote", "reads > 1.0 &&\n\tspeed < 2.0"); err != nil {
		t.Fatal(err)
	}
	var bad *RuleError
	if err := p.Validate(); !errors.As(err, &bad) {
		t.Fatal(err)
	}
	text, _ := p.Get(bad.Name)
	if got, want := bad.Point(text), "\tspeed < 2.0\n\t^"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
	if got := (&RuleError{Line: 1, Column: 4}).Point("äöü"); got != "äöü\n   ^" {
		t.Errorf("%q", got)
	}
	for _, e := range []RuleError{{Line: 0, Column: 1}, {Line: 2, Column: 1}} {
		if got := e.Point("one line"); got != "" {
			t.Errorf("%+v: %q", e, got)
		}
	}
	if got := (&RuleError{Line: 1, Column: 1025}).Point("short"); got != "short\n     ^" {
		t.Errorf("%q", got)
	}
}

func TestAssignments(t *testing.T) {
	want := []Assignment{
		{"budget.migrate", "64MiB"}, {"collect.classes", "4KiB,1048576"}, {"interval", "30s"},
		{"patterns.sata.min_accesses", "8"}, {"patterns.sata.promote", "reads > 20.0"},
	}
	for name, text := range map[string]string{
		"yaml": "interval: 30s\nbudget: {migrate: 64MiB}\ncollect:\n  classes: [4KiB, 1048576]\npatterns:\n  sata:\n    min_accesses: 8\n    promote: 'reads > 20.0'\n",
		"json": `{"interval": "30s", "budget": {"migrate": "64MiB"}, "collect": {"classes": ["4KiB", 1048576]}, "patterns": {"sata": {"min_accesses": 8, "promote": "reads > 20.0"}}}`,
		"flat": "interval: 30s\nbudget.migrate: 64MiB\ncollect.classes: 4KiB,1048576\npatterns.sata: {min_accesses: 8, promote: reads > 20.0}",
	} {
		got, err := Assignments([]byte(text))
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %+v", name, err, got)
		}
	}
	if got, err := Assignments([]byte("promote:\n")); err != nil || !slices.Equal(got, []Assignment{{"promote", ""}}) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := Assignments(nil); err != nil || len(got) > 0 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{"- a", "a", "a: [", "interval: 1s\ninterval: 2s", "when: 2026-01-01T00:00:00Z\n: x"} {
		if got, err := Assignments([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// FuzzAssignments: whatever a file says, it is refused or can be said again parameter by
// parameter.
func FuzzAssignments(f *testing.F) {
	f.Add([]byte("interval: 30s\npatterns: {sata: {min_accesses: 8, promote: 'reads > 20.0'}}"))
	f.Add([]byte(`{"collect": {"classes": ["4KiB", 1048576]}, "hysteresis": {"keep": 0.5}}`))
	f.Add([]byte("budget.migrate: 64M\npatterns.a.b.saves: 1ms"))
	f.Add([]byte("a: &x {b: 1}\nc: *x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := Assignments(b)
		if err != nil {
			return
		}
		p := Defaults()
		for _, a := range all {
			if p.Set(a.Name, a.Value) != nil {
				return
			}
		}
		again := Defaults()
		for _, q := range p.Parameters() {
			if err := again.Set(q.Name, q.Value); err != nil {
				t.Fatalf("%q: %v", q, err)
			}
			if got, ok := again.Get(q.Name); !ok || got != q.Value {
				t.Fatalf("%s: %q after %q", q.Name, got, q.Value)
			}
		}
		if bad := (*RuleError)(nil); errors.As(p.Validate(), &bad) {
			text, _ := p.Get(bad.Name)
			_ = bad.Point(text)
		}
	})
}
