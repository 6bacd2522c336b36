package hpdi

import (
	"errors"
	"strings"
	"testing"
)

// brokenQueue fails as a queue may: it takes no requests, or gives back an
// error, or fewer requests than it took.
type brokenQueue struct {
	Plain
	submit, wait error
	lose         int
	took         []*Request
}

func (q *brokenQueue) Submit(reqs ...*Request) error {
	if q.submit == nil {
		q.took = append(q.took, reqs...)
	}
	return q.submit
}

func (q *brokenQueue) Wait(_ int, done []*Request) ([]*Request, error) {
	return append(done, q.took[q.lose:]...), q.wait
}

func (q *brokenQueue) Close() error { return nil }

// Whatever a queue does wrong, Do never says that the requests are done.
func TestDoOnBrokenQueue(t *testing.T) {
	gone := errors.New("the ring is gone")
	for name, c := range map[string]struct {
		q    *brokenQueue
		want string
	}{
		"takes nothing": {&brokenQueue{submit: gone}, "the ring is gone"},
		"breaks":        {&brokenQueue{wait: gone}, "the ring is gone"},
		"loses one":     {&brokenQueue{lose: 1}, "1 of 2 requests completed"},
	} {
		err := Do(c.q, &Request{Op: OpFlush}, &Request{Op: OpFlush})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("a queue that %s: %v", name, err)
		}
	}
	if err := Do(&brokenQueue{}, &Request{Op: OpFlush}); err != nil {
		t.Errorf("a queue that works: %v", err)
	}
}
