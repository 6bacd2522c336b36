package guest

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// logLines is how many lines wait for a slow disk before some are lost.
const logLines = 1024

// logWriter writes lines in the background. The disk that holds a guest's log may be
// slow, or stuck, without being one of its devices; whoever logs, and answers the
// agent, must not wait for it.
type logWriter struct {
	to    io.Writer
	lines chan logLine
	lost  atomic.Int64 // lines for which there was no room
}

// logLine is a line, or, without text, a question whether all before it are written.
type logLine struct {
	text    []byte
	written chan struct{}
}

// newLogWriter returns a writer to w, whose goroutine ends with the process.
func newLogWriter(w io.Writer) *logWriter {
	l := &logWriter{to: w, lines: make(chan logLine, logLines)}
	go l.run()
	return l
}

func (l *logWriter) run() {
	for line := range l.lines {
		if n := l.lost.Swap(0); n > 0 {
			_, _ = fmt.Fprintf(l.to, "%d lines were not written: the disk of this log is too slow\n", n)
		}
		if line.text == nil {
			close(line.written)
			continue
		}
		_, _ = l.to.Write(line.text) // there is nobody to tell
	}
}

// Write takes a line. It never waits and never fails.
func (l *logWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- logLine{text: append([]byte{}, line...)}:
	default:
		l.lost.Add(1)
	}
	return len(line), nil
}

// Flush waits until everything is written, but not longer than limit.
func (l *logWriter) Flush(limit time.Duration) {
	q := logLine{written: make(chan struct{})}
	end := time.After(limit)
	select {
	case l.lines <- q:
	case <-end:
		return
	}
	select {
	case <-q.written:
	case <-end:
	}
}
