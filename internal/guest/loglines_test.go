package guest

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// stuckWriter is a log on a disk that takes nothing until it is released.
type stuckWriter struct {
	released chan struct{}
	strings.Builder
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	<-w.released
	return w.Builder.Write(p)
}

// A stuck disk under the log keeps nobody who logs waiting, and the log tells
// afterwards what it lacks.
func TestLogOnStuckDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stuckWriter{released: make(chan struct{})}
		l := newLogWriter(w)
		defer close(l.lines)
		for i := range logLines + 500 {
			fmt.Fprintf(l, "line %d\n", i)
		}
		begun := time.Now()
		l.Flush(time.Second)
		if took := time.Since(begun); took != time.Second {
			t.Errorf("it was waited for %v", took)
		}
		close(w.released)
		l.Flush(time.Second)
		fmt.Fprintln(l, "the last")
		l.Flush(time.Second)
		got := w.String()
		for _, want := range []string{"line 0\n", fmt.Sprintf("line %d\n", logLines-1), "lines were not written", "the last\n"} {
			if !strings.Contains(got, want) {
				t.Errorf("%q is missing", want)
			}
		}
		lost := 0 // the writer may tell of it more than once
		for line := range strings.Lines(got) {
			if strings.Contains(line, "not written") {
				n := 0
				if _, err := fmt.Sscanf(line, "%d lines", &n); err != nil {
					t.Error(err)
				}
				lost += n
			}
		}
		if n := strings.Count(got, "line ") + lost; n != logLines+500 {
			t.Errorf("%d lines were written or counted, of %d", n, logLines+500)
		}
	})
}
