package blocktest

import (
	"fmt"
	"strings"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
)

// Recorder writes down what the devices that it wrapped are asked to do, in
// the order of submission, one line for each request:
//
//	a: write 4096+8192
//	a: flush
//	b: read 0+4096 (device is closed)
//
// The name is left out when empty. An error is added when the request has
// completed. Note puts a line of the test's own between them.
type Recorder struct {
	mu    sync.Mutex // guards lines
	lines []string
}

// Wrap returns dev with every request recorded under name.
func (rec *Recorder) Wrap(name string, dev hpdi.Device) hpdi.Device {
	if name != "" {
		name += ": "
	}
	return &traced{Device: dev, rec: rec, prefix: name}
}

// NewTrace wraps one device and returns it with its recorder.
func NewTrace(dev hpdi.Device) (hpdi.Device, *Recorder) {
	rec := new(Recorder)
	return rec.Wrap("", dev), rec
}

// Note adds a line.
func (rec *Recorder) Note(format string, args ...any) {
	rec.add(fmt.Sprintf(format, args...))
}

func (rec *Recorder) add(line string) int {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.lines = append(rec.lines, line)
	return len(rec.lines) - 1
}

// String returns what was recorded, each line ended by a newline.
func (rec *Recorder) String() string {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if len(rec.lines) == 0 {
		return ""
	}
	return strings.Join(rec.lines, "\n") + "\n"
}

// Take returns what was recorded and forgets it. Nothing may be in flight.
func (rec *Recorder) Take() string {
	s := rec.String()
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.lines = nil
	return s
}

// fail adds the error of a request to its line.
func (rec *Recorder) fail(line int, err error) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if line < len(rec.lines) {
		rec.lines[line] += fmt.Sprintf(" (%v)", err)
	}
}

type traced struct {
	hpdi.Device
	rec    *Recorder
	prefix string
}

func (d *traced) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	return &tracedQueue{Queue: q, d: d, lines: make(map[*hpdi.Request]int)}, nil
}

type tracedQueue struct {
	hpdi.Queue
	d     *traced
	lines map[*hpdi.Request]int // where each request in flight is recorded
}

func (q *tracedQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		line := q.d.prefix + r.Op.String()
		if r.Op != hpdi.OpFlush {
			line += fmt.Sprintf(" %d+%d", r.Offset, r.Bytes())
		}
		if r.Durable {
			line += " durable"
		}
		q.lines[r] = q.d.rec.add(line)
	}
	return q.Queue.Submit(reqs...)
}

func (q *tracedQueue) Wait(minimum int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	start := len(done)
	done, err := q.Queue.Wait(minimum, done)
	for _, r := range done[start:] {
		if r.Err != nil {
			q.d.rec.fail(q.lines[r], r.Err)
		}
		delete(q.lines, r)
	}
	return done, err
}
