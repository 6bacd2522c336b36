package cli

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// A person who waits for an evacuation sees how far it is, on standard error.
func TestEvacuationProgress(t *testing.T) {
	dir, err := os.MkdirTemp("", "plx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := control.AgentSocket(dir)
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	looks := 0
	srv := control.Serve(ln, control.Handlers{
		EvacuateFlash: func(context.Context, string, control.FlashEvacuation) (control.PoolFlash, error) {
			return control.PoolFlash{}, nil
		},
		Pool: func(context.Context, string) (control.Pool, error) {
			f := &control.FlashStatus{State: control.FlashEvacuating, SetBytes: 1 << 20, Used: 3, Left: 3, Total: 4}
			if looks++; looks > 1 {
				f.State, f.Used, f.Left = control.FlashEvacuated, 0, 0
			}
			return control.Pool{State: "open", Stats: control.PoolStatus{Flash: f}}, nil
		},
		Flash: func(context.Context, string) (control.PoolFlash, error) {
			return control.PoolFlash{Pool: "p", FlashStatus: control.FlashStatus{Device: "d", State: control.FlashEvacuated}}, nil
		},
	})
	t.Cleanup(func() { _ = srv.Close(context.Background()) })
	var out, errs strings.Builder
	s := &session{out: &out, err: &errs, watched: true, now: time.Now, dir: dir}
	if status := s.main(t.Context(), []string{"flash", "evacuate", "p", "--wait", "--dir", dir}); status != 0 {
		t.Fatalf("%d: %s", status, errs.String())
	}
	shown := "p: evacuation, 1.0 MiB of 4.0 MiB (25%)"
	if want := "\r" + shown + "\r" + strings.Repeat(" ", len(shown)) + "\r"; errs.String() != want {
		t.Errorf("shown: %q", errs.String())
	}
	if !strings.Contains(out.String(), "d, evacuated\n") {
		t.Error(out.String())
	}
}

// Whatever a policy is, its text sets all of it again.
func TestPolicyText(t *testing.T) {
	p := policy.Defaults()
	for name, value := range map[string]string{
		"collect.classes": "8KiB,1MiB", "collect.operations": "writes", "hysteresis.gain": "1000000", "budget.wear": "1TiB",
		"patterns.default.promote": "'it''s' == \"#\" || reads > 1.0 # no", "patterns.sata.v2.demote": "reads <\n\t1.0", "patterns.null.saves": "1ms", "patterns.7.saves": "2ms",
		"patterns.a: b.saves": "3ms", "patterns.on.promote": "true", "patterns.x.promote": "- no: {list}", "patterns.y.promote": "*anchor",
	} {
		if err := p.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	shown := control.FlashPolicy{Pool: "p"}
	for _, q := range p.Parameters() {
		shown.Parameters = append(shown.Parameters, control.FlashParameter{Name: q.Name, Value: q.Value, Default: q.Default})
	}
	text := policyText(shown)
	all, err := policy.Assignments([]byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	again := policy.Defaults()
	for _, a := range all {
		if err := again.Set(a.Name, a.Value); err != nil {
			t.Error(err)
		}
	}
	if d := policy.Diff(p, again); len(d) > 0 || len(all) != len(shown.Parameters) {
		t.Errorf("%d of %d: %+v\n%s", len(all), len(shown.Parameters), d, text)
	}
	for i, q := range shown.Parameters {
		marked := strings.Contains(strings.Split(strings.SplitN(text, "\n", 2)[1], "\n")[lineOf(t, text, q.Name, i)], "  # default: ")
		if marked != (q.Value != q.Default) {
			t.Errorf("%s: marked %v", q.Name, marked)
		}
	}
}

// lineOf returns which of the lines after the first has the i-th parameter.
func lineOf(t *testing.T, text, name string, i int) int {
	t.Helper()
	for n, line := range strings.Split(text, "\n")[1:] {
		if strings.HasPrefix(line, "#") || strings.HasSuffix(line, ":") {
			continue // a comment or a group
		}
		if i == 0 {
			return n
		}
		i--
	}
	t.Fatalf("no line has %s", name)
	return 0
}
