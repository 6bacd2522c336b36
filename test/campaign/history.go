package campaign

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

// access is one read or write of one unit by one attempt.
type access struct {
	write bool
	maybe bool // a write of which nobody knows whether it had an effect
	value uint64
	call  time.Duration // since the history began
	ret   time.Duration
}

func (a access) String() string {
	what := "read"
	switch {
	case a.maybe:
		what = "lost attempt to write"
	case a.write:
		what = "write"
	}
	return fmt.Sprintf("%12.6f .. %12.6f  %s %d", a.call.Seconds(), a.ret.Seconds(), what, a.value)
}

// history is what happened to the units of one volume since they were last
// known.
type history struct {
	mu    sync.Mutex
	began time.Time
	known []uint64 // value of each unit when the history began
	units map[uint64][]access
}

func newHistory(units int) *history {
	return &history{known: make([]uint64, units), units: map[uint64][]access{}, began: time.Now()}
}

// wrote records a write of value to n units: each attempt that was lost may
// have taken effect, the last one has.
func (h *history) wrote(first, n int, value uint64, attempts []nbdclient.Attempt) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, at := range attempts {
		h.addLocked(first, n, func(int) access { return access{write: true, maybe: at.Lost, value: value} }, at)
	}
}

// read records what a read found.
func (h *history) read(first int, values []uint64, attempts []nbdclient.Attempt) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addLocked(first, len(values), func(i int) access { return access{value: values[i]} }, attempts[len(attempts)-1])
}

func (h *history) addLocked(first, n int, f func(int) access, at nbdclient.Attempt) {
	for i := range n {
		a := f(i)
		a.call, a.ret = at.Sent.Sub(h.began), at.Ended.Sub(h.began)
		h.units[uint64(first+i)] = append(h.units[uint64(first+i)], a)
	}
}

// settle checks the history, of which the last access to each unit must be a
// read after everything else, and begins a new one.
func (h *history) settle(final []uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for u, v := range final {
		all := h.units[uint64(u)]
		if len(all) == 0 {
			if v != h.known[u] {
				return fmt.Errorf("unit %d was not written and reads as %d instead of %d", u, v, h.known[u])
			}
			continue
		}
		if !linearizable(h.known[u], all) {
			return fmt.Errorf("unit %d is not linearizable: it held %d, and then\n%s", u, h.known[u], describe(all))
		}
	}
	copy(h.known, final)
	clear(h.units)
	h.began = time.Now()
	return nil
}

// checkLimit is how long one unit's history may take to check; they take
// microseconds.
const checkLimit = 30 * time.Second

// linearizable checks the history of one register.
func linearizable(initial uint64, all []access) bool {
	ops := make([]porcupine.Operation, len(all))
	maybe := false
	for i, a := range all {
		ops[i] = porcupine.Operation{Input: a, Call: int64(a.call), Return: int64(a.ret)}
		maybe = maybe || a.maybe
	}
	model := porcupine.Model{
		Init: func() any { return initial },
		Step: func(state, in, _ any) (bool, any) {
			if a := in.(access); !a.write {
				return state == a.value, state
			}
			return true, in.(access).value
		},
	}
	if maybe {
		uncertain := porcupine.NondeterministicModel{
			Init: func() []any { return []any{initial} },
			Step: func(state, in, _ any) []any {
				switch a := in.(access); {
				case a.maybe:
					return []any{state, a.value}
				case a.write:
					return []any{a.value}
				case state == a.value:
					return []any{state}
				}
				return nil
			},
		}
		model = uncertain.ToModel()
	}
	return porcupine.CheckOperationsTimeout(model, ops, checkLimit) == porcupine.Ok
}

// describe shows a history in the order of its calls, from its end.
func describe(all []access) string {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b access) int { return int(a.call - b.call) })
	var b strings.Builder
	const most = 60
	if n := len(all) - most; n > 0 {
		fmt.Fprintf(&b, "  (%d before these)\n", n)
		all = all[n:]
	}
	for _, a := range all {
		fmt.Fprintf(&b, "  %v\n", a)
	}
	return b.String()
}
