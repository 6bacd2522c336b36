package region

import (
	"cmp"
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
	return r.AddSectionUnless(kind, length, func() bool { return false })
}

// AddSectionUnless is AddSection that gives up with block.ErrClosed when stop, which it
// asks all the time, says so. The host may need seconds to find and clear memory, while
// other sections may come and go.
func (r *Region) AddSectionUnless(kind SectionKind, length int64, stop func() bool) (Section, []byte, error) {
	s, mem, err := r.addSection(kind, length, stop)
	if err != nil {
		return Section{}, nil, fmt.Errorf("%s of %d bytes in region %s: %w", kind, length, r.path, err)
	}
	return s, mem, nil
}

func (r *Region) addSection(kind SectionKind, length int64, stop func() bool) (Section, []byte, error) {
	if length <= 0 || length > maxSize/2 {
		return Section{}, nil, block.ErrInvalid
	}
	s, err := r.reserve(kind, length)
	if err != nil {
		return Section{}, nil, err
	}
	mem, err := r.provide(s, stop)
	r.changing.Lock()
	defer r.changing.Unlock()
	r.coming = slices.DeleteFunc(r.coming, func(c Section) bool { return c == s })
	if err == nil {
		r.keep(s, mem)
		var h Header
		if h, err = r.headerToChange(); err == nil {
			h.insert(s)
			err = r.replaceHeader(h)
		}
	}
	if err != nil {
		return Section{}, nil, errors.Join(err, r.unmap(s), r.giveBack(s, r.taken(r.Header())))
	}
	return s, mem, nil
}

// reserve finds a place for a section, which is nobody else's until it is in the header or
// given up.
func (r *Region) reserve(kind SectionKind, length int64) (Section, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	h, err := r.headerToChange()
	if err != nil {
		return Section{}, err
	}
	for _, c := range r.coming {
		h.insert(c)
	}
	s := Section{Kind: kind, Length: roundUp(length, h.unit())}
	h.place(&s)
	if h.insert(s); h.Size > maxSize {
		return Section{}, fmt.Errorf("a region has at most %d bytes: %w", int64(maxSize), block.ErrInvalid)
	}
	// Encoded once before anything is done: a full table changes nothing.
	if err := h.encode(make([]byte, headerLen)); err != nil {
		return Section{}, err
	}
	r.coming = append(r.coming, s)
	return s, nil
}

// insert names a section.
func (h *Header) insert(s Section) {
	i, _ := slices.BinarySearchFunc(h.Sections, s, func(a, b Section) int { return cmp.Compare(a.Offset, b.Offset) })
	h.Sections = slices.Insert(slices.Clone(h.Sections), i, s)
	h.Size = max(h.Size, s.end())
}

// taken returns the end of what a header names, or somebody is making.
func (r *Region) taken(h Header) int64 {
	end := h.Size
	for _, c := range r.coming {
		end = max(end, c.end())
	}
	return end
}

// provide gives a section that the header does not name yet its memory, all zero, and maps
// it.
func (r *Region) provide(s Section, stop func() bool) ([]byte, error) {
	// Somebody who died may have left something there.
	if err := r.punch(s.Offset, s.Length); err != nil {
		return nil, err
	}
	if err := r.allocate(s); err != nil {
		return nil, err
	}
	mem, err := r.mmapSection(s)
	if err != nil {
		return nil, err
	}
	for at := int64(0); at < s.Length && err == nil; at += clearAtOnce {
		if err = populate(mem[at:min(at+clearAtOnce, s.Length)]); err == nil && stop() {
			err = block.ErrClosed
		}
	}
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(mem))
	}
	return mem, nil
}

// clearAtOnce is how many bytes are cleared before somebody is asked whether that is to go
// on. It takes much longer than to allocate them.
const clearAtOnce = 4 << 20

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
// process, and maps it. Memory that is there is not touched: page by page that would take a
// second for some GiB of small pages.
func (r *Region) mapSection(s Section) ([]byte, error) {
	if hole, err := unix.Seek(int(r.file.Fd()), s.Offset, unix.SEEK_HOLE); err != nil || hole < s.end() {
		if err := r.allocate(s); err != nil {
			return nil, err
		}
	}
	mem, err := r.mmapSection(s)
	if err == nil {
		r.keep(s, mem)
	}
	return mem, err
}

// allocate gives a section memory, where it has none.
func (r *Region) allocate(s Section) error {
	err := unix.Fallocate(int(r.file.Fd()), 0, s.Offset, s.Length)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("no room for %d bytes of memory: %w", s.Length, err)
	case err != nil:
		return fmt.Errorf("allocate %d bytes: %w", s.Length, err)
	}
	return nil
}

func (r *Region) mmapSection(s Section) ([]byte, error) {
	mem, err := unix.Mmap(int(r.file.Fd()), s.Offset, int(s.Length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", s.Length, err)
	}
	return mem, nil
}

// keep remembers what is mapped.
func (r *Region) keep(s Section, mem []byte) {
	if r.mapped == nil {
		r.mapped = map[int64][]byte{}
	}
	r.mapped[s.Offset] = mem
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
		err = errors.Join(r.unmap(s), r.giveBack(s, r.taken(h)))
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
	for _, c := range r.coming {
		h.insert(c)
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

// place gives a section the first offset where it fits.
func (h *Header) place(s *Section) {
	s.Offset = h.Fixed()
	for _, next := range h.Sections[1:] {
		if s.Offset+s.Length <= next.Offset {
			return
		}
		s.Offset = roundUp(next.end(), h.unit())
	}
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
