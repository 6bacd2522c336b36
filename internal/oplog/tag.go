package oplog

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// maxGroup bounds the records of a tagged change: those of the largest write, were all its
// extents apart, and its ends.
const maxGroup = 1<<16 - 1

// tagWords is how many words of Record.CRC a tag takes.
const tagWords = 4

// TagRecord returns the record that says that the next n records are the change of a
// submission.
func TagRecord(id block.VolumeID, tag block.Tag, n int) Record {
	r := Record{Kind: KindTag, Volume: id, Count: uint64(n), First: Extent(tag.Queue) | Extent(tag.Slot)<<16}
	// A tag lies in what other records keep checksums in: so those are no larger for it.
	r.CRC[0], r.CRC[1] = uint32(tag.Session), uint32(tag.Session>>32)
	r.CRC[2], r.CRC[3] = uint32(tag.Counter), uint32(tag.Counter>>32)
	return r
}

// Tag returns the tag of a KindTag record.
func (r *Record) Tag() block.Tag {
	return block.Tag{
		Session: block.SessionID(uint64(r.CRC[0]) | uint64(r.CRC[1])<<32),
		Queue:   uint16(r.First),
		Slot:    uint16(r.First >> 16),
		Counter: uint64(r.CRC[2]) | uint64(r.CRC[3])<<32,
	}
}

// checkTag returns why a KindTag record is malformed.
func (r *Record) checkTag() error {
	tag := r.Tag()
	switch {
	case tag.Session == 0 || tag.Counter == 0:
		return fmt.Errorf("tag of session %d, submission %d", tag.Session, tag.Counter)
	case r.Count > maxGroup:
		return fmt.Errorf("tag of %d records", r.Count)
	case r.LBA != 0:
		return fmt.Errorf("tag at block %d", r.LBA)
	}
	return nil
}

// groups follows records and knows which belong to a tagged change that is not whole yet.
// The zero groups stands between two changes.
type groups struct {
	tag  block.Seq // of the last change
	last block.Seq // of its records
}

// next takes the next record and says whether it may stand there.
func (g *groups) next(r *Record) bool {
	if r.Kind != KindTag {
		return true
	}
	if r.Seq <= g.last {
		return false
	}
	g.tag, g.last = r.Seq, r.Seq+block.Seq(r.Count)
	return true
}

// whole returns the last record up to and including at that is no part of a change which
// ends behind at.
func (g *groups) whole(at block.Seq) block.Seq {
	if g.last > at && !planted.Has(planted.GroupNotCut) {
		return g.tag - 1
	}
	return at
}

// cut ends the log before a tagged change whose guest died as it published it: nobody saw
// any of it. The records behind head, up to natural, are whole and have extents.
func (a *attach) cut(head, natural block.Seq) {
	var rec Record
	for seq := natural; seq > head; seq-- {
		if !a.read(0, seq, &rec) {
			a.read(1, seq, &rec)
		}
		if rec.Kind == KindWrite {
			for i := range Extent(rec.Count) {
				a.arena.putLocked(rec.First + i)
			}
		}
	}
}

// erase makes sure that records behind the head are not taken for published ones when
// others have been stored before them. The last goes first: who dies meanwhile leaves a
// shorter change that is not whole, and no hole.
func erase[S sink](s S, l *Log, head, natural block.Seq) {
	if planted.Has(planted.CutNotErased) {
		return
	}
	for seq := natural; seq > head; seq-- {
		for _, ring := range l.geo.ring {
			s.seal(ring+l.slot(seq), 0)
		}
	}
}
