package dump

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap"
)

// Flash is what a flash device says about itself.
type Flash struct {
	Found
	Device   string `json:"device"`
	ID       string `json:"id"`
	SetBytes int64  `json:"set_bytes"`
	// Slots that there are, of which Used hold a data set. Lost data sets cannot be reached,
	// and LostPages of the table cannot be read.
	Slots     int            `json:"slots"`
	Used      int            `json:"used"`
	Lost      int            `json:"lost"`
	LostPages int            `json:"lost_pages"`
	Primaries []FlashPrimary `json:"primaries"`
	// Policy is what people have said, JSON, empty where nothing is kept.
	Policy string `json:"policy,omitempty"`
	// Collected is how many bytes of what was collected are kept.
	Collected int `json:"collected_bytes"`
}

// FlashPrimary is a device whose data sets may be there.
type FlashPrimary struct {
	Number int    `json:"number"` // in the pool, from 1
	ID     string `json:"id"`
	Sets   uint64 `json:"sets"` // that it had when it was largest
	On     int    `json:"on_flash"`
}

// ReadFlash shows what a flash device says about itself.
func ReadFlash(paths []string, o Options) (*Flash, error) {
	devs, err := o.open(paths)
	if err != nil {
		return nil, err
	}
	defer closeAll(devs[1:])
	f, err := flashmap.Open(devs[0])
	if err != nil {
		return nil, errors.Join(err, devs[0].Close())
	}
	s := f.Status()
	r := &Flash{Found: o.found(), Device: s.Info.Name, ID: s.ID.String(), SetBytes: s.SetBytes, Slots: s.Slots, Used: s.Used, Lost: s.Lost, LostPages: s.LostPages, Primaries: []FlashPrimary{}}
	for _, p := range f.Primaries() {
		if r.row() {
			r.Primaries = append(r.Primaries, FlashPrimary{p.Number + 1, p.ID.String(), uint64(p.Sets), p.On})
		}
	}
	for _, p := range f.Check() {
		r.bad("%s", p)
	}
	for _, note := range []flashmap.Note{flashmap.NotePolicy, flashmap.NoteAccess} {
		b, err := f.ReadNote(note)
		switch {
		case err == nil && note == flashmap.NotePolicy:
			r.Policy = string(b)
		case err == nil:
			r.Collected = len(b)
		case !errors.Is(err, block.ErrNotFound) || errors.Is(err, block.ErrCorrupt):
			r.bad("%v", err)
		}
	}
	return r, f.Close()
}
