package pair

import (
	"os"
	"os/exec"
)

// Need skips a test where a program is missing, or fails it when
// POLLUX_REQUIRE_CLIENTS=1 says that all must be there.
func Need(t interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}, programs ...string) {
	t.Helper()
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("POLLUX_REQUIRE_CLIENTS") == "1" {
				t.Fatalf("%s is missing: run make deps", name)
			}
			t.Skipf("%s is missing: run make deps", name)
		}
	}
}
