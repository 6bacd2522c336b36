package flashmap

import (
	"errors"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// breaking is a device whose queues take requests and break: when they are given some,
// when they are asked for some, or by knowing of none any more.
type breaking struct {
	hpdi.Device
	at string
}

func (d breaking) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &breakingQueue{q, d.at}, err
}

type breakingQueue struct {
	hpdi.Queue
	at string
}

func (q *breakingQueue) Submit(reqs ...*hpdi.Request) error {
	switch q.at {
	case "submit":
		return errBroken
	case "lost":
		return nil
	}
	return q.Queue.Submit(reqs...)
}

func (q *breakingQueue) Wait(min int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.at == "wait" {
		return done, errBroken
	}
	return q.Queue.Wait(min, done)
}

// All that is under way at a queue that breaks comes back with an error, once, and so does
// what is given to it later. What is on flash is not disturbed.
func TestQueueBreaks(t *testing.T) {
	for _, at := range []string{"submit", "wait", "lost"} {
		primary, flash := disks(t)
		f, d := attach(t, primary, flash)
		in(t, f, 10)
		_, err := d.Detach()
		must(t, err)
		d, err = f.Over(breaking{primary, at}, Primary{Number: 3, ID: primaryID})
		must(t, err)
		q, err := d.NewQueue(8)
		must(t, err)
		request := func(op hpdi.Op, set int64) *hpdi.Request {
			return &hpdi.Request{Op: op, Offset: set * setBytes, Vec: [][]byte{pattern(0, 1)}}
		}
		there := request(hpdi.OpRead, 10)
		for range 2 {
			reqs := []*hpdi.Request{request(hpdi.OpRead, 11), request(hpdi.OpWrite, 12), request(hpdi.OpRead, 13), there}
			must(t, q.Submit(reqs...))
			done, err := q.Wait(len(reqs), nil)
			must(t, err)
			if len(done) != len(reqs) {
				t.Fatalf("%s: %d of %d requests came back", at, len(done), len(reqs))
			}
			for _, r := range reqs {
				if !slices.Contains(done, r) {
					t.Errorf("%s: a %v did not come back", at, r.Op)
				}
				if ok := r == there; ok != (r.Err == nil) {
					t.Errorf("%s: %v at data set %d: %v", at, r.Op, r.Offset/setBytes, r.Err)
				}
				if at != "lost" && r.Err != nil && !errors.Is(r.Err, errBroken) {
					t.Errorf("%s: the error is %v", at, r.Err)
				}
			}
		}
		if n := q.(*queue).pending; n != 0 {
			t.Errorf("%s: %d operations are still under way", at, n)
		}
		must(t, q.Close())
		must(t, errors.Join(d.Close(), f.Close()))
	}
}

// A read of the primary alone goes there as it is, whatever the application keeps in it.
func TestPassed(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	in(t, f, 10)
	q, err := d.NewQueue(8)
	must(t, err)
	var apart part // another layer's
	reqs := []*hpdi.Request{
		{Op: hpdi.OpRead, Offset: 11 * setBytes, Vec: [][]byte{pattern(0, 1)}, User: &apart},
		{Op: hpdi.OpRead, Offset: 11 * setBytes, Vec: [][]byte{pattern(0, setBlocks)}, User: 7},
		{Op: hpdi.OpRead, Offset: 11*setBytes - block.Size, Vec: [][]byte{pattern(0, 2)}}, // half of it on flash
	}
	must(t, q.Submit(reqs...))
	if n := len(q.(*queue).sides[onPrimary].passed); n != 2 {
		t.Errorf("%d requests were passed on", n)
	}
	done, err := q.Wait(3, nil)
	must(t, err)
	if len(done) != 3 || reqs[0].User != &apart || reqs[1].User != 7 {
		t.Errorf("%d requests are complete, with %v and %v", len(done), reqs[0].User, reqs[1].User)
	}
	for _, r := range done {
		must(t, r.Err)
	}
	must(t, q.Close())
	must(t, errors.Join(d.Close(), f.Close()))
}
