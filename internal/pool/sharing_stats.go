package pool

import (
	"context"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/space"
)

// Sharing tells what of a pool is shared.
type Sharing struct {
	SharingCounts
	// Refers is how many bytes of data the pool's volumes refer to, those included that
	// were overwritten, trimmed or deleted and are not freed yet; Stored is how many
	// bytes of devices that takes, once however many refer to them. Refers less Stored
	// is Saved.
	Refers, Stored int64
	// Metadata are the bytes in use that hold no data: pages of maps, counts and
	// fingerprints, their twins too.
	Metadata int64
	// References says how many blocks have how many references, pages of metadata
	// included, which have one each. Where the pool changes it is of another moment than
	// the rest.
	References [space.MaxCount + 1]int64
	// Index is nil as long as no volume has shared blocks since the pool was made.
	Index *IndexProgress
	// Resized is the one of another size that takes its place when it is complete, or nil.
	Resized *IndexProgress
	// Survey tells of the newest survey. It is of another moment than the rest.
	Survey SurveyStats
	// Volumes are in the order of their creation.
	Volumes []VolumeSharing
}

// IndexProgress describes an index of fingerprints and how far it is made.
type IndexProgress struct {
	dedup.IndexStats
	// Done of Pages have been looked at; it is complete when all are.
	Done, Pages int
	// Kept says that it outlives the guest, in the pool's region; Why says why not.
	Kept bool
	Why  string
}

// indexProgress describes an index, if there is one.
func (p *Pool) indexProgress(x *dedup.Index) *IndexProgress {
	if x == nil {
		return nil
	}
	i := &IndexProgress{IndexStats: x.Stats(), Kept: x.Kept() > 0}
	if !i.Kept {
		i.Why = p.indexOwn
	}
	if i.Done, i.Pages = p.machine.IndexProgress(x.Round.Place); x.Round.Done {
		i.Done = i.Pages
	}
	return i
}

// VolumeSharing describes one volume: what it refers to as of the last fold, and the
// counters since the pool was opened.
type VolumeSharing struct {
	VolumeInfo
	cp.VolumeStats
}

// Sharing returns what of the pool is shared. It waits for the counts of a pool that has
// just been opened, and for the consistency point under way.
func (p *Pool) Sharing(ctx context.Context) (s Sharing, err error) {
	err = p.do(ctx, func() error {
		// All of it is of one moment between two steps of the machine.
		u := p.space.Usage()
		s.Refers = p.bmap.References() * block.Size
		s.SharingCounts = p.Stats().Sharing
		s.Saved = u.More * block.Size
		s.Stored = s.Refers - s.Saved
		total, free := p.space.Apart()
		s.Metadata = (u.InUse()+total-free)*block.Size - s.Stored
		for _, v := range p.catalogue.List() {
			s.Volumes = append(s.Volumes, VolumeSharing{infoOf(v), p.machine.VolumeStats(v.ID)})
		}
		s.Index = p.indexProgress(p.machine.Index)
		s.Resized = p.indexProgress(p.machine.Next)
		s.Survey = p.survey.Stats()
		return nil
	})
	if err == nil {
		s.References = p.space.References()
	}
	return s, err
}
