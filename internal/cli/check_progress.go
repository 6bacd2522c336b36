package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
)

// askEvery is how often a running pair is asked how far its check has come.
const askEvery = 500 * time.Millisecond

// progressLine shows how far something has come, in one line of a terminal
// that is written over again and again. One goroutine at a time uses it.
type progressLine struct {
	w   io.Writer
	now func() time.Time

	what  string    // pool and phase that since and from are about
	since time.Time // when it was first shown
	from  int64     // bytes done by then
	shown int       // runes of the line
}

// show replaces the line.
func (l *progressLine) show(p control.CheckProgress) {
	now := l.now()
	if what := p.Pool + "\x00" + p.Phase; what != l.what {
		l.what, l.since, l.from = what, now, p.Done
	}
	text := fmt.Sprintf("%s: %s, %s", p.Pool, p.Phase, humanSize(p.Done))
	if p.Total > 0 {
		text += fmt.Sprintf(" of %s (%d%%)", humanSize(p.Total), min(100, 100*p.Done/p.Total))
	}
	if took := now.Sub(l.since); took >= time.Second {
		rate := float64(p.Done-l.from) / took.Seconds()
		text += fmt.Sprintf(", %s/s", humanSize(int64(rate)))
		if left := p.Total - p.Done; rate > 0 && left > 0 {
			text += fmt.Sprintf(", %s left", time.Duration(float64(left)/rate*1e9).Round(time.Second))
		}
	}
	l.put(text)
}

// put writes text over what is shown.
func (l *progressLine) put(text string) {
	n := len([]rune(text))
	fmt.Fprintf(l.w, "\r%s%s", text, strings.Repeat(" ", max(0, l.shown-n)))
	l.shown = n
}

// clear takes the line away.
func (l *progressLine) clear() {
	if l.shown > 0 {
		l.put("")
		fmt.Fprint(l.w, "\r")
	}
}

// watch shows how far a running pair's check has come until stop is called.
func (l *progressLine) watch(ctx context.Context, client *control.Client) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(askEvery)
		defer tick.Stop()
		for turn := 0; ; turn++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			// Pools of both guests are checked at once: in turn.
			if all, err := client.Checking(ctx); err == nil && len(all) > 0 {
				l.show(all[turn%len(all)])
			}
		}
	}()
	return func() {
		cancel()
		<-ended
		l.clear()
	}
}
