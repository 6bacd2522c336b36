package sim

import (
	"context"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// Some clients send requests again as a virtual machine does whose disk server has died: by
// slot and counter, from a record that outlives the server. Each change of theirs must be
// made exactly once, whatever dies.

const (
	queuesOf = 2
	slotsOf  = 4 // in each queue; a client has at most eight requests under way
)

// numbered is what a session has of such a client.
type numbered struct {
	on      bool
	id      block.SessionID
	counter uint64
	// Where the volume's own session was opened last: there it must be found again.
	region string
	vol    block.VolumeID
}

// number gives a request its slot and counter.
func (s *session) number(r *request) {
	if !s.numbered.on {
		return
	}
	for r.slot = 0; slices.ContainsFunc(s.flying, func(o *request) bool { return o != r && o.slot == r.slot }); r.slot++ {
	}
	s.numbered.counter++
	r.counter = s.numbered.counter
}

// tag returns what a change of the request is published with.
func (r *request) tag() block.Tag {
	if !r.s.numbered.on {
		return block.Tag{}
	}
	return block.Tag{Session: r.s.numbered.id, Queue: uint16(r.slot % queuesOf), Slot: uint16(r.slot / queuesOf), Counter: r.counter}
}

func (r *request) changes() bool { return r.op != opRead && r.op != opFlush }

// resume tells whether a request that arrives was carried out by a server before, or before
// its connection broke. With it the volume's session is opened, once a connection.
func (c *conn) resume(v block.Volume, r *request) (done bool, err error) {
	n := &c.s.numbered
	if !n.on {
		return false, nil
	}
	w, pl := c.s.w, c.s.w.pools[c.s.identity]
	w.observe()
	if id := v.Info().ID; c.session == nil || c.vol != id {
		if c.session, err = v.OpenSession(c.ctx, n.id, queuesOf, slotsOf); err != nil {
			c.session = nil
			return false, err
		}
		if c.session.Fresh() {
			if n.region == pl.made && n.vol == id {
				w.violate("the session of %s with %s is forgotten", c.s.name, c.s.volume)
			}
			for _, o := range c.s.flying {
				o.logged = 0 // nobody knows
			}
		}
		n.region, n.vol, c.vol = pl.made, id, id
	}
	if !r.changes() {
		return false, nil
	}
	tag := r.tag()
	if done, err = c.session.Done(int(tag.Queue), int(tag.Slot), tag.Counter); err != nil {
		return false, err
	}
	if done != (r.logged != 0) {
		w.violate("of %s the session says that it is done: %t; it was published at %d", r, done, r.logged)
	}
	if done {
		w.skipped++
		w.log("%s is not run again", r)
	}
	return done, nil
}

// finish completes a request that was carried out before.
func finish(ctx context.Context, v block.Volume, r *request) error {
	if r.fua {
		return v.Flush(ctx)
	}
	return nil
}

// publishTag begins the change of a request: the records that follow are its, and it has none
// yet.
func (pl *pool) publishTag(v *volume, rec *oplog.Record) {
	tag := rec.Tag()
	for _, s := range pl.w.sessions() {
		if s.volume != v.name || !s.numbered.on || s.numbered.id != tag.Session {
			continue
		}
		for _, r := range s.flying {
			if r.tag() != tag {
				continue
			}
			if r.logged != 0 {
				pl.w.violate("%s is published again at %d, after %d", r, rec.Seq, r.logged)
			}
			r.logged = rec.Seq
			pl.change, pl.rest = r, rec.Count
			return
		}
	}
	pl.w.violate("record %d of %s has the tag %+v, which is of no request under way", rec.Seq, pl.identity, tag)
}

// publishOfChange enters a record that belongs to a tag.
func (pl *pool) publishOfChange(v *volume, rec *oplog.Record) {
	r := pl.change
	if !pl.explains(v, r, rec) {
		pl.w.violate("record %d of %s, of blocks %d+%d of %s, is no part of %s, whose tag is before it", rec.Seq, pl.identity, rec.LBA, rec.Count, v.name, r)
		return
	}
	pl.enter(v, []*request{r}, rec)
	if pl.rest--; pl.rest == 0 {
		if _, missing, ok := r.all(); !ok {
			pl.w.violate("the change of %s lacks block %d", r, missing)
		}
	}
}
