package region

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Options describes a new region.
type Options struct {
	Pool     block.PoolID
	Owner    string // at most 64 bytes
	Epoch    block.Epoch
	LogBytes int64 // length of the log section, oplog.SectionSize of its payload
}

// Region is a mapped region.
type Region struct {
	path     string
	file     *os.File
	mem      []byte // header, words and log: the part that never changes its place
	log      []byte // in mem
	readOnly bool

	changing sync.Mutex       // one change of the sections at a time
	mapped   map[int64][]byte // sections by offset, guarded by changing
	coming   []Section        // that have a place and are not in the header yet, guarded by changing

	mu    sync.Mutex
	hdr   Header      // guarded by mu
	owned block.Epoch // epoch that it was opened in, or SetOwner has set; guarded by mu
}

// BootID returns the identity of the running boot of the host. A region whose
// header carries another one cannot exist: memory does not survive a boot.
func BootID() (string, error) {
	p, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id of the host: %w", err)
	}
	id, err := uuid.Parse(strings.TrimSpace(string(p)))
	if err != nil {
		return "", fmt.Errorf("boot id of the host: %w", err)
	}
	return id.String(), nil
}

// hugePage is the page size that regions are rounded up to, so that no huge
// page of the medium lies half outside.
const hugePage = 2 << 20

// Create makes a region with a log section at path, all memory allocated, and
// maps it read-write. A file that is there already is block.ErrExists. The
// name appears last: a process that dies meanwhile leaves nothing behind.
func Create(path string, o Options) (*Region, error) {
	r, err := create(path, o)
	if err != nil {
		return nil, fmt.Errorf("create region %s: %w", path, err)
	}
	return r, nil
}

func create(path string, o Options) (*Region, error) {
	if o.LogBytes <= 0 || o.LogBytes > maxSize/2 {
		return nil, fmt.Errorf("log of %d bytes: %w", o.LogBytes, block.ErrInvalid)
	}
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	length := roundUp(o.LogBytes, pageSize)
	log := Section{SectionLog, firstAt, length}
	h := Header{
		ID: uuid.NewString(), Pool: o.Pool, Owner: o.Owner, Epoch: o.Epoch, BootID: boot,
		Size: baseEnd(log), Sections: []Section{log}, generation: 1,
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("unnamed file in %s: %w", filepath.Dir(path), err)
	}
	r := &Region{path: path, file: os.NewFile(uintptr(fd), path), hdr: h}
	if err := r.fill(fd); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = block.ErrExists
		}
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// fill allocates the file's memory, maps it and writes its header.
func (r *Region) fill(fd int) error {
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return fmt.Errorf("set mode 0600: %w", err)
	}
	if err := unix.Fallocate(fd, 0, 0, r.hdr.Size); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
			return fmt.Errorf("no room for %d bytes of memory; give the pool a smaller log or free memory: %w", r.hdr.Size, err)
		}
		return fmt.Errorf("allocate %d bytes: %w", r.hdr.Size, err)
	}
	if err := r.mmap(fd, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	if err := populate(r.mem); err != nil {
		return err
	}
	r.hdr.Medium = mediumOf(filepath.Dir(r.path))
	r.owned = r.hdr.Epoch
	r.word(wordEpoch).Store(uint64(r.hdr.Epoch))
	return r.storeHeader()
}

// populate lets the kernel clear all memory now, so that no write of a client
// pays for a page fault. It does so in pieces: the process's memory map is
// locked meanwhile, for seconds where the host has to find gigabytes, and a
// guest that stands so long is taken for hung.
func populate(mem []byte) error {
	for at := 0; at < len(mem); at += hugePage {
		switch err := unix.Madvise(mem[at:min(at+hugePage, len(mem))], unix.MADV_POPULATE_WRITE); {
		case errors.Is(err, unix.EINVAL): // a kernel before 5.14: page faults do it
			return nil
		case err != nil:
			return fmt.Errorf("clear %d bytes of memory: %w", len(mem), err)
		}
	}
	return nil
}

// mmap maps what every user of a region has mapped. Sections that come and go are
// mapped one by one, by the owner alone.
func (r *Region) mmap(fd, prot int) error {
	log := r.hdr.Sections[0]
	mem, err := unix.Mmap(fd, 0, int(r.hdr.Fixed()), prot, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %d bytes: %w", r.hdr.Fixed(), err)
	}
	end := log.Offset + log.Length
	r.mem, r.log = mem, mem[log.Offset:end:end]
	return nil
}

// Open maps an existing region. It trusts nothing in the file: one that is
// not a whole region of ours is refused. A missing file is fs.ErrNotExist.
func Open(path string, readOnly bool) (*Region, error) {
	flags, prot := unix.O_RDWR, unix.PROT_READ|unix.PROT_WRITE
	if readOnly {
		flags, prot = unix.O_RDONLY, unix.PROT_READ
	}
	// O_NONBLOCK: a named pipe in the region's place must not hang us.
	fd, err := unix.Open(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open region", Path: path, Err: err}
	}
	r := &Region{path: path, file: os.NewFile(uintptr(fd), path), readOnly: readOnly}
	err = r.validate(fd)
	if err == nil {
		err = r.mmap(fd, prot)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open region %s: %w", path, err), r.Close())
	}
	r.hdr.Medium = mediumOf(filepath.Dir(path))
	r.owned = r.Epoch()
	return r, nil
}

// validate checks the file before any of it is mapped.
func (r *Region) validate(fd int) error {
	st, err := r.readHeader(fd)
	if err != nil {
		return err
	}
	base := r.hdr.Fixed()
	if st.Size < base {
		return corrupt("file", "%d bytes long instead of %d", st.Size, base)
	}
	needed := base
	for _, s := range r.hdr.Sections[1:] {
		needed += s.Length
	}
	if st.Blocks*512 >= needed {
		return nil
	}
	// What is advisory may have lost its memory, the log may not.
	if hole, err := unix.Seek(fd, 0, unix.SEEK_HOLE); err != nil || hole < base || st.Blocks*512 < base {
		return corrupt("file", "only %d of %d bytes have memory", st.Blocks*512, needed)
	}
	return nil
}

// readHeader reads the header, and tells what the file is like while the header is that:
// its owner may be changing both. The file grows before the header says so, and becomes
// smaller after that.
func (r *Region) readHeader(fd int) (st unix.Stat_t, err error) {
	if err := unix.Fstat(fd, &st); err != nil {
		return st, fmt.Errorf("stat: %w", err)
	}
	if err := mayBeRegion(&st); err != nil {
		return st, err
	}
	for range headerTries {
		if err = r.readCopies(); err != nil {
			continue
		}
		was := r.hdr.generation
		if err := unix.Fstat(fd, &st); err != nil {
			return st, fmt.Errorf("stat: %w", err)
		}
		if err = r.readCopies(); err == nil && r.hdr.generation == was {
			break
		}
	}
	if err != nil {
		return st, err
	}
	if s := r.hdr.Sections; len(s) == 0 || s[0].Kind != SectionLog {
		return st, corrupt("section table", "the first section is not the operation log")
	}
	return st, nil
}

// headerTries is how often a header is read that may be changing.
const headerTries = 4

// readCopies reads the header.
func (r *Region) readCopies() error {
	var p [2 * pageSize]byte
	if _, err := r.file.ReadAt(p[:], 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	return r.hdr.decodeTwice(p[:])
}

// mayBeRegion tells why a file is none of ours, whatever is in it.
func mayBeRegion(st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("not a regular file: %w", block.ErrInvalid)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("belongs to user %d: %w", st.Uid, block.ErrInvalid)
	case st.Mode&0o077 != 0:
		return fmt.Errorf("mode %#o lets others in, must be 0600: %w", st.Mode&0o777, block.ErrInvalid)
	case st.Size < firstAt:
		return corrupt("file", "only %d bytes long", st.Size)
	}
	return nil
}

// storeHeader writes both copies, one after the other. The caller holds mu or is alone.
func (r *Region) storeHeader() error {
	var p [headerLen]byte
	if err := r.hdr.encode(p[:]); err != nil {
		return err
	}
	for copyAt := 0; copyAt < wordsAt; copyAt += pageSize {
		if planted.Has(planted.SingleHeaderCopy) && copyAt > 0 {
			break
		}
		ondisk.StoreWords(r.mem[copyAt:], p[:])
	}
	return nil
}

// word returns an aligned word of the region.
func (r *Region) word(at int) *atomic.Uint64 {
	_ = r.mem[at+7]
	return (*atomic.Uint64)(unsafe.Pointer(&r.mem[at]))
}

// Path returns the file's name.
func (r *Region) Path() string { return r.path }

// Header returns the header as it is now. While the owner rewrites it, a
// reader gets the former one.
func (r *Region) Header() Header {
	r.mu.Lock()
	defer r.mu.Unlock()
	var h Header
	if err := h.decodeTwice(r.mem[:2*pageSize]); err == nil && h.ID == r.hdr.ID && h.hasLog(r.hdr.Sections[0]) {
		h.Medium = r.hdr.Medium
		r.hdr = h
	}
	return r.hdr
}

// SetOwner records that owner holds the pool from epoch on. An epoch that is
// lower than the stored one is block.ErrStale: somebody else took over.
func (r *Region) SetOwner(owner string, epoch block.Epoch) error {
	if r.readOnly {
		return fmt.Errorf("set owner of region %s: %w", r.path, block.ErrReadOnly)
	}
	h := r.Header()
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := lastEpoch(h, r.Epoch()); epoch < now {
		return fmt.Errorf("set owner of region %s to epoch %d, it has %d: %w", r.path, epoch, now, block.ErrStale)
	}
	former := r.hdr
	h.Owner, h.Epoch = owner, epoch
	h.generation++
	// Encoded once before anything is stored: a refused owner changes nothing.
	if err := h.encode(make([]byte, headerLen)); err != nil {
		return err
	}
	r.word(wordEpoch).Store(uint64(epoch))
	r.hdr = h
	if err := r.storeHeader(); err != nil {
		r.hdr = former
		return err
	}
	r.owned = epoch
	return nil
}

// Epoch returns the epoch of the owner. A guest that finds a higher one than
// its own has lost the pool.
func (r *Region) Epoch() block.Epoch { return block.Epoch(r.word(wordEpoch).Load()) }

// LastEpoch returns the epoch of the last owner: that of the word, which is stored before the
// header, or that of the header where the word has been damaged.
func (r *Region) LastEpoch() block.Epoch { return lastEpoch(r.Header(), r.Epoch()) }

// mostAhead is how many epochs the word may be ahead of the header: one for each owner that
// died between the two stores, and as long as anybody could wait for that.
const mostAhead = 1 << 16

func lastEpoch(h Header, word block.Epoch) block.Epoch {
	if word < h.Epoch || word-h.Epoch > mostAhead {
		return h.Epoch
	}
	return word
}

// Beat advances the heartbeat.
func (r *Region) Beat() { r.word(wordHeartbeat).Add(1) }

// Heartbeat returns how often Beat was called in the life of the region.
func (r *Region) Heartbeat() uint64 { return r.word(wordHeartbeat).Load() }

// SetState records what the owner does.
func (r *Region) SetState(s State) { r.word(wordState).Store(uint64(s)) }

// State returns what the owner does.
func (r *Region) State() State { return State(r.word(wordState).Load()) }

// Announce records that the owner has announced the region to its partner
// once more, and returns how often it has.
func (r *Region) Announce() uint64 { return r.word(wordAnnounced).Add(1) }

// Announced returns how often the region was announced.
func (r *Region) Announced() uint64 { return r.word(wordAnnounced).Load() }

// SetCommitted records that the consistency point cp has committed the log up
// to seq. It is for status only. Consistency points rise; one goroutine at a
// time may call it.
func (r *Region) SetCommitted(cp block.CP, seq block.Seq) {
	at := committedAt(cp)
	r.word(at + 8).Store(0)
	r.word(at).Store(uint64(seq))
	r.word(at + 8).Store(uint64(cp))
}

// mostApart is how far the numbers of the two consistency points may lie apart that were
// recorded last: by one, and by two more for each owner that died between a point and its
// record, one after the other.
const mostApart = 64

// Committed returns the newest consistency point that was recorded, and up to
// where it committed the log. It is 0 where the two that are recorded do not fit each other:
// words have no checksum, and one of them has been damaged.
func (r *Region) Committed() (cp block.CP, seq block.Seq) {
	a, b := block.CP(r.word(wordCommitted0+8).Load()), block.CP(r.word(wordCommitted1+8).Load())
	if a != 0 && b != 0 && max(a, b)-min(a, b) > mostApart {
		return 0, 0
	}
	for _, at := range []int{wordCommitted0, wordCommitted1} {
		n := block.CP(r.word(at + 8).Load())
		s := block.Seq(r.word(at).Load())
		// The pair belongs together when its number is still there. While
		// it is being replaced the other one is the newest.
		if n > cp && committedAt(n) == at && block.CP(r.word(at+8).Load()) == n {
			cp, seq = n, s
		}
	}
	return cp, seq
}

func committedAt(cp block.CP) int {
	if cp%2 == 0 {
		return wordCommitted0
	}
	return wordCommitted1
}

// Log returns the memory of the operation log, aligned to 4 KiB. In a region
// that was opened read-only a store to it kills the process.
func (r *Region) Log() []byte { return r.log }

// Close unmaps the region with all its sections. The file stays.
func (r *Region) Close() error {
	var errs []error
	for at, mem := range r.mapped {
		errs = append(errs, unix.Munmap(mem))
		delete(r.mapped, at)
	}
	if r.mem != nil {
		errs = append(errs, unix.Munmap(r.mem))
		r.mem, r.log = nil, nil
	}
	if r.file != nil {
		errs = append(errs, r.file.Close())
		r.file = nil
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close region %s: %w", r.path, err)
	}
	return nil
}

// Remove deletes the file and unmaps the region. It may be called only when
// the log is committed. A file of the same name that is not this region stays.
func (r *Region) Remove() error {
	mine, err := r.file.Stat()
	if err != nil {
		return fmt.Errorf("remove region %s: %w", r.path, err)
	}
	if there, err := os.Lstat(r.path); err == nil && os.SameFile(mine, there) {
		if err := os.Remove(r.path); err != nil {
			return errors.Join(fmt.Errorf("remove region: %w", err), r.Close())
		}
	}
	return r.Close()
}
