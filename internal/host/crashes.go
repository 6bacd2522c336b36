package host

import (
	"bytes"
	"encoding/json"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/crash"
	"github.com/pollux-storage/pollux/internal/domain"
)

// crashEvents is how many of the last events a crash report has.
const crashEvents = 100

// keepTold keeps what guests have just said of themselves, which names the pools that
// they have open and their epochs.
func (a *agent) keepTold(reports map[string]control.Status) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, st := range reports {
		if m := a.members[name]; m != nil && len(st.Guests) == 1 {
			m.told = &told{pid: st.Guests[0].PID, status: st.Guests[0]}
		}
	}
}

// report keeps what a domain that has ended left, unless it ended in good order. The loop
// calls it after it has done what others wait for; the work is done beside the loop.
func (a *agent) report(d domain.Domain) {
	ended, cfg := time.Now(), a.settings()
	a.wg.Go(func() {
		size := int64(cfg.CrashReports.Size)
		left, err := a.opt.Driver.Remains(d, size)
		if err != nil {
			a.log.Warn("what a guest has left", "guest", d.Name(), "error", err)
		}
		if left == nil {
			return
		}
		r := crash.Report{
			Guest: d.Name(), Incarnation: d.Inc(), PID: d.PID(), Reason: d.Reason(), Version: a.opt.Version,
			Started: d.Started(), Ended: ended, Said: left.Said, Events: a.events.lines(crashEvents), Log: left.Log,
		}
		a.mu.Lock()
		if t := a.members[d.Name()].told; t != nil && t.pid == d.PID() {
			r.Status = t.status
		}
		a.mu.Unlock()
		path, err := crash.Write(cfg.CrashDir(), r, crash.Limits{Reports: cfg.CrashReports.Keep, Bytes: size})
		if err != nil {
			a.log.Warn("report of a guest that failed", "guest", d.Name(), "error", err)
		}
		if path != "" {
			a.event(d.Name(), "crash-report", map[string]string{"file": path}, "what guest %s left as it failed (process %d) is in %s", d.Name(), d.PID(), path)
		}
	})
}

// lines returns the last events, one JSON object a line.
func (l *eventLog) lines(n int) []byte {
	events, _ := l.since(0)
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, e := range events[max(0, len(events)-n):] {
		_ = enc.Encode(e) // which can be written was written before
	}
	return b.Bytes()
}
