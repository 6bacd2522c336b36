package guest

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/config"
)

// TestProcessRefuses: a process that was not started as the agent does it says
// what is missing, and touches nothing.
func TestProcessRefuses(t *testing.T) {
	b := newBench(t)
	for name, c := range map[string]struct {
		run  func() error
		want string
	}{
		"flag":   {func() error { return Main(t.Context(), []string{"--nonsense"}) }, "not defined"},
		"orphan": {func() error { return Main(t.Context(), Args(b.cfg.Dir, "a", 1)) }, "before it had recorded"},
		"settings": {func() error {
			return runProcess(t.Context(), filepath.Join(b.cfg.Dir, "none"), "a", 1, quiet(), Options{})
		}, "settings"},
		"name": {func() error { return runProcess(t.Context(), b.cfg.Dir, "nobody", 1, quiet(), Options{}) }, `no guest "nobody"`},
		"socket": {func() error {
			cfg := config.Config{Dir: filepath.Join(b.cfg.Dir, "none"), Guests: b.cfg.Guests}
			return Run(t.Context(), Options{Config: &cfg, Name: "a", Logger: quiet()})
		}, "no such file"},
	} {
		if err := c.run(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
