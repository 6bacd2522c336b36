package sim

import (
	"fmt"
	"strings"

	"github.com/pollux-storage/pollux/internal/partner"
)

// doExpect: expect|await served ID by GUEST | error CLIENT [TEXT] | alert GUEST
// KEY | no-alert GUEST KEY | refused ID | waits CLIENT | left ID, whatever was to
// leave its pool | flash ID STATE, see flashIs | skipped: a request was not run again that
// the log had. await gives it time.
func (w *World) doExpect(l Line) error {
	var holds func() bool
	switch l.arg(1) {
	case "served":
		holds = func() bool {
			p, _ := w.serving(l.arg(2))
			if l.arg(4) == "nobody" {
				return p == nil
			}
			return p != nil && p.name == l.arg(4)
		}
	case "error", "no-error":
		holds = func() bool { return w.hadError(l.arg(2), strings.Join(l.Fields[3:], " ")) == (l.arg(1) == "error") }
	case "alert", "no-alert":
		holds = func() bool { return w.alerted(l.arg(2), l.arg(3)) == (l.arg(1) == "alert") }
	case "refused":
		holds = func() bool { pl := w.pools[l.arg(2)]; return pl != nil && pl.refusal != nil }
	case "waits":
		holds = func() bool { return !w.idle() }
	case "flash":
		if _, err := w.flashIs(l); err != nil {
			return err
		}
		holds = func() bool { is, _ := w.flashIs(l); return is }
	case "left":
		holds = func() bool {
			_, t := w.serving(l.arg(2))
			return t != nil && t.pool.Stats().Removal.Device == ""
		}
	case "skipped":
		holds = func() bool { return w.skipped > 0 }
	case "guests":
		holds = func() bool { return w.protected() }
	default:
		return fmt.Errorf("nothing is known of %q", l.arg(1))
	}
	if l.arg(0) == "await" {
		w.until(patience, holds)
	}
	if !holds() {
		told := ""
		if l.arg(1) == "flash" {
			told = w.tellFlash(l.arg(2))
		}
		w.violate("line %d: %s does not hold%s", l.Number, l, told)
	}
	return nil
}

func (w *World) hadError(client, text string) bool {
	if c := w.cls[client]; c != nil {
		for _, v := range sortedKeys(c.sessions) {
			for _, err := range c.sessions[v].errs {
				if strings.Contains(err.Error(), text) {
					return true
				}
			}
		}
	}
	return false
}

func (w *World) alerted(g, key string) bool {
	if g == partner.Host {
		return w.host.ref != nil && w.host.ref.Alerts()[key] != ""
	}
	p := w.procs[g]
	return p != nil && p.alerts[key] != ""
}

// protected says that every identity is served, but for pools that are damaged
// and refused, and that every guest is up.
func (w *World) protected() bool {
	for _, id := range w.host.names {
		if p, _ := w.serving(id); (p == nil || p.hung) && !w.pools[id].lost() {
			return false
		}
		if p := w.procs[id]; p == nil || p.dead.Load() {
			return false
		}
	}
	return true
}
