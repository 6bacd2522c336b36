package host

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/pollux-storage/pollux/internal/control"
)

// keep is how many events are held in memory for those who ask.
const keep = 4096

// eventLog is a file of events, one JSON object a line, bounded: at max bytes
// it becomes .1 and a new one is begun.
type eventLog struct {
	path string
	max  int64

	mu     sync.Mutex // guards what follows
	f      *os.File
	size   int64
	events []control.Event // the newest, oldest first
	seq    uint64
	more   chan struct{} // closed and replaced when an event comes
}

func openEvents(path string, limit int64) (*eventLog, error) {
	l := &eventLog{path: path, max: limit, more: make(chan struct{})}
	for _, p := range []string{path + ".1", path} {
		if err := l.read(p); err != nil {
			return nil, err
		}
	}
	return l, l.open()
}

func (l *eventLog) open() (err error) {
	if l.f, err = os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return fmt.Errorf("event log: %w", err)
	}
	st, err := l.f.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("event log: %w", err), l.f.Close())
	}
	l.size = st.Size()
	return nil
}

// read takes in a file of events. A line that was cut by a crash is skipped.
func (l *eventLog) read(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("event log: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if e, err := parseEvent(sc.Bytes()); err == nil {
			l.push(e)
		}
	}
	return nil
}

func parseEvent(p []byte) (control.Event, error) {
	var e control.Event
	err := json.Unmarshal(p, &e)
	return e, err
}

func (l *eventLog) push(e control.Event) {
	l.events = append(l.events, e)
	if len(l.events) > 2*keep {
		l.events = append([]control.Event{}, l.events[len(l.events)-keep:]...)
	}
	l.seq = max(l.seq, e.Seq)
}

// add numbers an event and records it. Followers get it even when the file
// cannot be written.
func (l *eventLog) add(e control.Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Seq = l.seq + 1
	l.push(e)
	close(l.more)
	l.more = make(chan struct{})
	p, err := json.Marshal(e)
	if err != nil {
		return err
	}
	p = append(p, '\n')
	if l.size+int64(len(p)) > l.max && l.size > 0 {
		err := errors.Join(l.f.Close(), os.Rename(l.path, l.path+".1"))
		if err = errors.Join(err, l.open()); err != nil {
			return err
		}
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return err
}

func (l *eventLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.f.Close()
}

// since returns the events after a number, and what is closed when one more
// comes.
func (l *eventLog) since(seq uint64) ([]control.Event, chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := len(l.events)
	for i > 0 && l.events[i-1].Seq > seq {
		i--
	}
	return append([]control.Event{}, l.events[i:]...), l.more
}

// serve answers a query.
func (l *eventLog) serve(ctx context.Context, q control.EventQuery, end <-chan struct{}, emit func(control.Event) error) error {
	events, more := l.since(q.After)
	if q.Last > 0 && len(events) > q.Last {
		events = events[len(events)-q.Last:]
	}
	for {
		for _, e := range events {
			if err := emit(e); err != nil {
				return err
			}
			q.After = e.Seq
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-more:
		case <-end:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
		events, more = l.since(q.After)
	}
}
