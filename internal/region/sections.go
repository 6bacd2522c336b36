package region

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// Advisory sections come and go while the region is in use, each with memory and a mapping
// of its own. Memory is there before the header names a section, and goes after it does
// not: whoever dies at any step leaves a region that opens, with the section or without,
// and at worst with memory that no section has, which Tidy gives back.
//
//	header:  | log |          header:  | log | index |
//	memory:  | log | index |  memory:  | log |
//	a section that comes      one that never is
//
// The partner maps header, words and log alone, which never move, so that nothing of what
// it has mapped changes under it.

// SectionMemory returns how much memory a section for so many bytes takes at most.
func SectionMemory(length int64) int64 { return roundUp(length, hugePage) }

// SectionLength returns how many bytes a section of this region has that AddSection makes
// for length bytes.
func (r *Region) SectionLength(length int64) int64 {
	h := r.Header()
	return roundUp(length, h.unit())
}

// Sections returns the sections of a kind that the region has now, in the order of their
// offsets.
func (r *Region) Sections(kind SectionKind) []Section {
	return slices.DeleteFunc(slices.Clone(r.Header().Sections), func(s Section) bool { return s.Kind != kind })
}

// AddSection makes an advisory section that has at least length bytes, all of them zero
// and with memory, and maps it. Where there is no room for it, in memory or in the
// header, nothing changes; a region that somebody else has taken is block.ErrStale.
func (r *Region) AddSection(kind SectionKind, length int64) (Section, []byte, error) {
	s, mem, err := r.addSection(kind, length)
	if err != nil {
		return Section{}, nil, fmt.Errorf("%s of %d bytes in region %s: %w", kind, length, r.path, err)
	}
	return s, mem, nil
}

func (r *Region) addSection(kind SectionKind, length int64) (Section, []byte, error) {
	if length <= 0 || length > maxSize/2 {
		return Section{}, nil, block.ErrInvalid
	}
	r.changing.Lock()
	defer r.changing.Unlock()
	h, err := r.headerToChange()
	if err != nil {
		return Section{}, nil, err
	}
	s := Section{Kind: kind, Length: roundUp(length, h.unit())}
	i := h.place(&s)
	h.Sections = slices.Insert(slices.Clone(h.Sections), i, s)
	if h.Size = max(h.Size, s.end()); h.Size > maxSize {
		return Section{}, nil, fmt.Errorf("a region has at most %d bytes: %w", int64(maxSize), block.ErrInvalid)
	}
	// Encoded once before anything is done: a full table changes nothing.
	if err := h.encode(make([]byte, headerLen)); err != nil {
		return Section{}, nil, err
	}
	mem, err := r.provide(s)
	if err == nil {
		err = r.replaceHeader(h)
	}
	if err != nil {
		return Section{}, nil, errors.Join(err, r.unmap(s), r.giveBack(s, r.Header().Size))
	}
	return s, mem, nil
}

// provide gives a section that the header does not name yet its memory, and maps it.
func (r *Region) provide(s Section) ([]byte, error) {
	// Somebody who died may have left something there.
	if err := r.punch(s.Offset, s.Length); err != nil {
		return nil, err
	}
	return r.mapSection(s)
}

// MapSection maps a section of the region, once; it need not have all its memory any more,
// and what it lacks is zero. The mapping is gone after RemoveSection and Close.
func (r *Region) MapSection(s Section) ([]byte, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	if mem := r.mapped[s.Offset]; int64(len(mem)) == s.Length {
		return mem, nil
	}
	h, err := r.headerToChange()
	if err == nil && !slices.Contains(h.Sections[1:], s) {
		err = block.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("map %s at %d of region %s: %w", s.Kind, s.Offset, r.path, err)
	}
	mem, err := r.mapSection(s)
	if err != nil {
		return nil, fmt.Errorf("region %s: %w", r.path, err)
	}
	return mem, nil
}

// mapSection makes sure that a section has memory, without which touching it would end the
// process, and maps it.
func (r *Region) mapSection(s Section) ([]byte, error) {
	if err := unix.Fallocate(int(r.file.Fd()), 0, s.Offset, s.Length); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
			return nil, fmt.Errorf("no room for %d bytes of memory: %w", s.Length, err)
		}
		return nil, fmt.Errorf("allocate %d bytes: %w", s.Length, err)
	}
	mem, err := unix.Mmap(int(r.file.Fd()), s.Offset, int(s.Length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", s.Length, err)
	}
	if err := populate(mem); err != nil {
		return nil, errors.Join(err, unix.Munmap(mem))
	}
	if r.mapped == nil {
		r.mapped = map[int64][]byte{}
	}
	r.mapped[s.Offset] = mem
	return mem, nil
}

// RemoveSection takes an advisory section out, whose mapping nobody uses any more, and
// gives its memory back.
func (r *Region) RemoveSection(s Section) error {
	r.changing.Lock()
	defer r.changing.Unlock()
	h, err := r.headerToChange()
	if err != nil {
		return fmt.Errorf("remove %s from region %s: %w", s.Kind, r.path, err)
	}
	i := slices.Index(h.Sections[1:], s) + 1
	if i == 0 {
		return fmt.Errorf("remove %s at %d from region %s: %w", s.Kind, s.Offset, r.path, block.ErrNotFound)
	}
	base := h.Fixed()
	h.Sections = slices.Delete(slices.Clone(h.Sections), i, i+1)
	if h.Size = base; len(h.Sections) > 1 {
		h.Size = h.Sections[len(h.Sections)-1].end()
	}
	if err = r.replaceHeader(h); err == nil {
		err = errors.Join(r.unmap(s), r.giveBack(s, h.Size))
	}
	if err != nil {
		return fmt.Errorf("remove %s from region %s: %w", s.Kind, r.path, err)
	}
	return nil
}

// Tidy gives back the memory that no section has: somebody died who had changed the
// sections. Only the owner may call it, when nobody else can be changing them.
func (r *Region) Tidy() error {
	r.changing.Lock()
	defer r.changing.Unlock()
	h, err := r.headerToChange()
	if err != nil {
		return fmt.Errorf("tidy region %s: %w", r.path, err)
	}
	at := h.Fixed()
	var errs []error
	for _, s := range h.Sections[1:] {
		if s.Offset > at {
			errs = append(errs, r.punch(at, s.Offset-at))
		}
		at = s.end()
	}
	if err := errors.Join(append(errs, r.cut(h.Size))...); err != nil {
		return fmt.Errorf("tidy region %s: %w", r.path, err)
	}
	return nil
}

// end returns the first byte behind a section.
func (s Section) end() int64 { return s.Offset + s.Length }

// unit is what the lengths of sections that come and go are multiples of: huge pages
// where the region is made of them.
func (h *Header) unit() int64 {
	if h.Fixed()%hugePage == 0 {
		return hugePage
	}
	return pageSize
}

// place gives a section the first offset where it fits, and returns its place in the
// table.
func (h *Header) place(s *Section) int {
	s.Offset = h.Fixed()
	for i, next := range h.Sections[1:] {
		if s.Offset+s.Length <= next.Offset {
			return i + 1
		}
		s.Offset = roundUp(next.end(), h.unit())
	}
	return len(h.Sections)
}

// headerToChange returns the header, if the region is still that of who has opened it.
func (r *Region) headerToChange() (Header, error) {
	if r.readOnly {
		return Header{}, block.ErrReadOnly
	}
	h := r.Header()
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := r.Epoch(); now != r.owned {
		return h, fmt.Errorf("it is at epoch %d and was taken at %d: %w", now, r.owned, block.ErrStale)
	}
	return h, nil
}

// replaceHeader makes h, made of the present header, the next one. The mapping of what
// never moves stays right, whatever the sections are.
func (r *Region) replaceHeader(h Header) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	former := r.hdr
	h.generation++
	r.hdr = h
	if err := r.storeHeader(); err != nil {
		r.hdr = former
		return err
	}
	return nil
}

// unmap unmaps a section, if it is mapped.
func (r *Region) unmap(s Section) error {
	mem := r.mapped[s.Offset]
	if mem == nil {
		return nil
	}
	delete(r.mapped, s.Offset)
	return unix.Munmap(mem)
}

// giveBack gives back the memory of a section of a region that has size bytes without it.
func (r *Region) giveBack(s Section, size int64) error {
	if s.Offset >= size {
		return r.cut(size)
	}
	return r.punch(s.Offset, s.Length)
}

// punch gives back memory within the file.
func (r *Region) punch(at, n int64) error {
	if err := unix.Fallocate(int(r.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n); err != nil {
		return fmt.Errorf("give back %d bytes of memory: %w", n, err)
	}
	return nil
}

// cut cuts off what lies behind the size, if anything does.
func (r *Region) cut(size int64) error {
	st, err := r.file.Stat()
	if err == nil && st.Size() > size {
		err = unix.Ftruncate(int(r.file.Fd()), size)
	}
	if err != nil {
		return fmt.Errorf("give back memory behind byte %d: %w", size, err)
	}
	return nil
}
