package cp

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// group gathers flushes that one append will serve. The first to join leads: it
// closes the group, once, and then tells each member what came out. Whoever
// joins a closed group leads the next one. The zero group is closed.
type group struct {
	mu    sync.Mutex // guards what follows; nobody waits under it
	led   bool       // the group is open: its leader has not closed it yet
	open  []*member  // who follows
	spare []*member  // memory for the next open
	idle  []*member  // to be used again
}

// member is one flush that follows. Its channel holds one outcome, so that
// telling never waits.
type member struct{ told chan outcome }

// join returns nil if the caller leads, and otherwise what it has to wait for.
func (g *group) join() *member {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.led {
		g.led = true
		return nil
	}
	var m *member
	if n := len(g.idle); n > 0 {
		m, g.idle = g.idle[n-1], g.idle[:n-1]
	} else {
		m = &member{told: make(chan outcome, 1)}
	}
	g.open = append(g.open, m)
	return m
}

// close ends the joining and returns the members, for tell.
func (g *group) close() []*member {
	g.mu.Lock()
	defer g.mu.Unlock()
	members := g.open
	g.led, g.open, g.spare = false, g.spare[:0], nil
	return members
}

// tell gives members of a closed group its outcome.
func (g *group) tell(members []*member, o outcome) {
	for _, m := range members {
		m.told <- o
	}
	clear(members)
	g.mu.Lock()
	g.spare = members
	g.mu.Unlock()
}

// wait returns what m was told. A member that leaves is missed by nobody.
func (g *group) wait(ctx context.Context, m *member) outcome {
	var o outcome
	select {
	case o = <-m.told:
	case <-ctx.Done():
		g.mu.Lock()
		i := slices.Index(g.open, m)
		if i >= 0 {
			g.open = slices.Delete(g.open, i, i+1)
		}
		g.mu.Unlock()
		o = outcome{err: waitEnded(ctx)}
		if i < 0 {
			return o // it will still be told something, and is not used again
		}
	}
	g.mu.Lock()
	g.idle = append(g.idle, m)
	g.mu.Unlock()
	return o
}

func waitEnded(ctx context.Context) error {
	return fmt.Errorf("wait for another flush: %w", ctx.Err())
}
