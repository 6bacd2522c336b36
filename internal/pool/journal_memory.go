package pool

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/region"
)

// The records of the journal that wait for a fold lie in a section of the pool's region,
// too, so that whoever opens the pool after this guest need not read them from a disk. The
// section is advisory: what is wrong with it costs the time of reading, and where the region
// has no room for it there is none.

// JournalMemory returns how much of its region the unfolded journal of a pool takes at most,
// with OpenOptions.FoldLimit, whatever the size of its journal.
func JournalMemory(foldLimit int) int64 {
	const anyJournal = 1 << 40
	return region.SectionMemory(cp.KeptBytes(foldLimit, anyJournal))
}

// recallJournal returns the copy of the journal that the region has, or nil. It changes
// nothing: the pool is not this guest's yet.
func (op *opener) recallJournal() *cp.KeptJournal {
	if op.region == nil {
		return nil
	}
	var errs []error
	for _, s := range op.region.Sections(region.SectionJournal) {
		mem, err := op.region.MapSection(s)
		if err == nil {
			var k *cp.KeptJournal
			if k, err = cp.AdoptJournal(mem, op.sb.Pool, op.label.Layout.Journal, op.label.Layout.JournalBlocks); err == nil {
				op.journal = s
				return k
			}
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		op.tell(TellKept, "the unfolded journal of pool %s is read from its device: %v", op.label.Name, err)
	}
	return nil
}

// keepJournal sees to it that the journal gets a section of the region, if it has none of the
// size that it is to have.
func (p *Pool) keepJournal() {
	size := cp.KeptBytes(p.opts.FoldLimit, p.label.Layout.JournalBlocks)
	var others []region.Section
	for _, s := range p.region.Sections(region.SectionJournal) {
		if s == p.journal && p.machine.KeptJournal().Bytes > 0 && s.Length == p.region.SectionLength(size) {
			continue
		}
		if s == p.journal {
			p.machine.LeaveJournal()
		}
		others = append(others, s)
	}
	if p.machine.KeptJournal().Bytes == 0 {
		p.journalComing.begin(p.region, region.SectionJournal, size, others)
		p.placeJournal()
		return
	}
	for _, s := range others {
		_ = p.region.RemoveSection(s) // or the next owner does
	}
	p.countKept()
}

// placeJournal begins to keep the journal in a section that has come.
func (p *Pool) placeJournal() {
	a, ok := p.journalComing.take()
	if !ok {
		return
	}
	defer p.countKept()
	err := a.err
	if err == nil {
		err = p.machine.KeepJournal(a.mem)
	}
	if err != nil {
		p.tell(TellKept, "whoever takes pool %s over will read its unfolded journal from a device: %v", p.label.Name, err)
		return
	}
	p.journal = a.section
}

// fillJournal brings what the journal's section lacks there, a step at a time, unless clients
// need what it would take.
func (p *Pool) fillJournal() {
	p.placeJournal()
	if p.machine.KeptBehind() && !p.pressed() {
		_ = p.machine.FillKept() // what cannot be read is left out
	}
}

// countKept makes Stats tell how many bytes of the region the sections have that save time
// at a takeover, or requests. It is called where they come and go.
func (p *Pool) countKept() {
	n := int64(0)
	for _, kind := range [...]region.SectionKind{region.SectionJournal, region.SectionHistory, region.SectionSessions} {
		for _, s := range p.region.Sections(kind) {
			n += s.Length
		}
	}
	p.regionKept.Store(n)
}
