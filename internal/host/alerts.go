package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// alertLook is how often the agent looks for alerts.
	alertLook = time.Second
	// alertRest is how long an alert must be gone before it is over, so that
	// one which comes and goes is told once.
	alertRest = 10 * time.Second
	// alertLimit bounds a run of the program that is told.
	alertLimit = 30 * time.Second
)

// Notice is what the program of the setting alerts.command reads from its standard
// input, as JSON.
type Notice struct {
	State string    `json:"state"` // "raised" or "over"
	Alert string    `json:"alert"`
	Since time.Time `json:"since"` // when it was raised
	Dir   string    `json:"dir"`   // of the pair
}

// The states of a Notice.
const (
	alertRaised = "raised"
	alertOver   = "over"
)

// alertBook knows which alerts stand. It has no clock and no goroutine.
type alertBook map[string]standing

// standing is since when an alert stands, and when it was seen last.
type standing struct{ since, seen time.Time }

// look takes in the alerts of a moment and returns what is new and what is over.
func (b alertBook) look(now time.Time, alerts []string) (out []Notice) {
	for _, text := range alerts {
		s, stands := b[text]
		if !stands {
			s.since = now
			out = append(out, Notice{State: alertRaised, Alert: text, Since: now})
		}
		s.seen = now
		b[text] = s
	}
	for _, text := range slices.Sorted(maps.Keys(b)) {
		if s := b[text]; now.Sub(s.seen) >= alertRest {
			out = append(out, Notice{State: alertOver, Alert: text, Since: s.since})
			delete(b, text)
		}
	}
	return out
}

// noticeQueue holds what the program has yet to be told: of each alert the newest,
// so that a slow program finds no heap of old ones.
type noticeQueue struct {
	waiting []Notice
}

// maxNotices bounds the queue. Alerts are of parts of the pair, of which there are
// few; more means that texts change all the time.
const maxNotices = 256

func (q *noticeQueue) add(n Notice) {
	q.waiting = slices.DeleteFunc(q.waiting, func(old Notice) bool { return old.Alert == n.Alert })
	if q.waiting = append(q.waiting, n); len(q.waiting) > maxNotices {
		q.waiting = q.waiting[1:]
	}
}

// watchAlerts records alerts as events and tells the program of the settings, one
// at a time, until ctx ends. Alerts that stand when the agent starts are told again.
func (a *agent) watchAlerts(ctx context.Context) {
	book := alertBook{}
	var queue noticeQueue
	tick := time.NewTicker(alertLook)
	defer tick.Stop()
	command := a.settings().Alerts.Command
	done := make(chan error, 1)
	told := false                 // the program runs
	recorded := map[string]bool{} // alerts whose events the loop records
	for {
		select {
		case <-ctx.Done():
			if told {
				<-done // its context has ended, too
			}
			return
		case err := <-done:
			if told = false; err != nil {
				a.event("", "alert-command-failed", nil, "%v", err)
			}
		case now := <-tick.C:
			st, s, err := a.observe(ctx)
			if err != nil {
				continue // it is ending, or too busy; the next look tells
			}
			a.tidyRemoved(ctx, st)
			for _, text := range s.alerts {
				recorded[text] = true
			}
			for _, n := range book.look(now, st.AlertTexts()) {
				if n.Dir = st.Agent.Dir; !recorded[n.Alert] {
					a.alertEvent(n)
				}
				if n.State == alertOver {
					delete(recorded, n.Alert)
				}
				if len(command) > 0 {
					queue.add(n)
				}
			}
		}
		if len(queue.waiting) > 0 && !told {
			n := queue.waiting[0]
			queue.waiting = queue.waiting[1:]
			told = true
			go func() { done <- tell(ctx, command, n) }()
		}
	}
}

// alertEvent records an alert that the referee has not recorded itself.
func (a *agent) alertEvent(n Notice) {
	if n.State == alertRaised {
		a.event("", "alert", nil, "%s", n.Alert)
		return
	}
	a.event("", "alert-over", nil, "no more: %s", n.Alert)
}

// tell runs the program for one notice and waits for its end.
func tell(ctx context.Context, command []string, n Notice) error {
	ctx, cancel := context.WithTimeout(ctx, alertLimit)
	defer cancel()
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdin = bytes.NewReader(append(text, '\n'))
	cmd.Env = append(os.Environ(), "POLLUX_ALERT="+n.Alert, "POLLUX_ALERT_STATE="+n.State, "POLLUX_DIR="+n.Dir)
	cmd.WaitDelay = time.Second
	var said beginning
	cmd.Stdout, cmd.Stderr = &said, &said
	// What it starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	kill := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel = kill
	if err = cmd.Start(); err == nil {
		err = cmd.Wait()
		_ = kill() // there may be nobody left
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return fmt.Errorf("alerts.command %s failed for %q: %w: %s", command[0], n.Alert, err, strings.TrimSpace(string(said)))
	}
	return nil
}

// beginning keeps the first bytes of what is written to it.
type beginning []byte

func (b *beginning) Write(p []byte) (int, error) {
	*b = append(*b, p[:min(len(p), 500-len(*b))]...)
	return len(p), nil
}
