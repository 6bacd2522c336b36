package vhostuser

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/virtio"
)

const (
	// slotBytes is what each chain has for what is not payload: header, range of a discard
	// or a write of zeroes, and status.
	slotBytes  = 64
	slotRange  = virtio.BlkHeaderBytes
	slotStatus = slotRange + virtio.BlkRangeBytes
	// noStatus is what the status is until the back-end has written one.
	noStatus byte = 0xff
)

// vring is a virtqueue, which several queues of the application may share.
type vring struct {
	d          *device
	index      int
	desc       []byte
	driver     []byte
	device     []byte
	slots      []byte
	kick, call int
	wait       *os.File // call, for the runtime to wait on

	mu      sync.Mutex // guards the rest
	drv     virtio.Driver
	cmds    []command // by number of the chain
	order   uint64
	up      bool       // a back-end has it
	dead    error      // why requests fail at once
	redo    []command  // of a back-end that has gone, to be sent before everything else
	first   *operation // requests that are not wholly in the virtqueue, in order
	last    *operation
	timed   int // of them, with a deadline
	need    int // buffers of the next command, for which there was no room; 0: not known
	queues  []*queue
	leader  *queue // that waits on call, or looks
	events  int    // queues that are waited for by a descriptor
	chain   []virtio.Buffer
	segs    int // most segments of a command
	most    int64
	segMost int64
}

// command is a chain in the virtqueue, or one to be.
type command struct {
	op      *operation // nil: none
	order   uint64
	kind    uint32
	off, n  int64
	vec, in int // where its payload begins: vector, and byte in it
}

// operation is a request that commands are made of. It is guarded by vring.mu.
type operation struct {
	q       *queue
	r       *hpdi.Request
	kind    uint32
	n       int64
	off     int64 // that commands were made for
	vec, in int
	left    int  // commands that are under way
	cut     bool // no more commands come
	next    *operation
}

// ringBytes is the size of a virtqueue's part of the device's own memory, and where its
// areas begin in it.
func ringBytes(size, chain int, f virtio.Features) (driver, device, slots, tables, all int) {
	desc, drv, dev := virtio.SplitBytes(size)
	if f.Has(virtio.FRingPacked) {
		desc, dev = virtio.PackedBytes(size)
		drv = dev
	}
	// What one side writes and the other reads is in cache lines of its own.
	line := func(n int) int { return (n + 127) / 128 * 128 }
	driver = line(desc)
	device = driver + line(drv)
	slots = device + line(dev)
	tables = slots + line(size*slotBytes)
	all = tables
	if f.Has(virtio.FIndirectDesc) {
		all += size * chain * virtio.DescBytes
	}
	return driver, device, slots, tables, (all + 4095) / 4096 * 4096
}

// newRing makes a virtqueue in mem, which has the size that ringBytes returns.
func (d *device) newRing(index int, mem []byte, chain int) (*vring, error) {
	driver, dev, slots, tables, _ := ringBytes(d.o.QueueSize, chain, d.features)
	v := &vring{
		d: d, index: index, desc: mem[:driver], driver: mem[driver:dev], device: mem[dev:slots], slots: mem[slots:tables],
		cmds: make([]command, d.o.QueueSize), chain: make([]virtio.Buffer, 0, chain), kick: -1, call: -1,
	}
	var err error
	v.drv, err = virtio.NewDriver(virtio.DriverOptions{
		Size: d.o.QueueSize, Features: d.features, Desc: v.desc, Driver: v.driver, Device: v.device,
		Tables: mem[tables:], TablesAddr: uint64(address(mem)) + uint64(tables), Chain: chain,
	})
	if err != nil {
		return nil, err
	}
	v.segs = min(chain, v.drv.Longest()) - 2
	if v.kick, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		v.call, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		v.free()
		return nil, fmt.Errorf("event descriptor: %w", err)
	}
	v.wait = os.NewFile(uintptr(v.call), "vhost-user call")
	return v, nil
}

func (v *vring) free() {
	if v.wait != nil {
		_ = v.wait.Close() // it is an event descriptor
	}
	if v.kick >= 0 {
		_ = unix.Close(v.kick)
	}
}

// signal makes an event descriptor readable. It cannot block, so the runtime need not
// know of the system call.
func signal(fd int) {
	one := uint64(1)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), 8) // it is readable if it is full
}

// drain makes it unreadable.
func drain(fd int) {
	var n uint64
	_, _, _ = unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&n)), 8) // it may be so already
}

// pumpLocked puts what it can of what waits into the virtqueue, and tells the back-end.
func (v *vring) pumpLocked() {
	if !v.up || v.redo == nil && v.first == nil || v.need > 0 && !v.drv.Fits(v.need) {
		return
	}
	n := 0
	for n < len(v.redo) && v.putLocked(&v.redo[n]) {
		n++
	}
	if v.redo = v.redo[n:]; len(v.redo) == 0 {
		v.redo = nil
		for v.first != nil && v.cutLocked(v.first) {
			v.takeLocked(nil, v.first)
		}
	}
	if v.drv.Publish() {
		signal(v.kick)
	}
}

// cutLocked makes the commands of a request, and reports whether all are in the virtqueue.
func (v *vring) cutLocked(op *operation) bool {
	for !op.cut {
		c := command{op: op, kind: op.kind, off: op.r.Offset + op.off, vec: op.vec, in: op.in}
		last := op.kind == virtio.BlkFlushCache
		switch op.kind {
		case virtio.BlkIn, virtio.BlkOut:
			c.n = v.span(op)
		case virtio.BlkDiscardRange:
			c.n = min(op.n-op.off, v.d.mostDiscard)
		case virtio.BlkWriteZeroRange:
			c.n = min(op.n-op.off, v.d.mostZeroes)
		}
		v.order++
		c.order = v.order
		if !v.putLocked(&c) {
			return false
		}
		op.left++
		op.off += c.n
		op.cut = last || op.off == op.n
		if len(op.r.Vec) > 0 {
			op.skip(c.n)
		}
	}
	return true
}

// skip moves past n bytes of the vectors.
func (op *operation) skip(n int64) {
	for n > 0 {
		rest := int64(len(op.r.Vec[op.vec]) - op.in)
		if n < rest {
			op.in += int(n)
			return
		}
		n -= rest
		op.vec, op.in = op.vec+1, 0
	}
}

// span is how many bytes of the payload the next command takes: whole blocks, as vectors
// and the largest pieces are.
func (v *vring) span(op *operation) int64 {
	var n int64
	segs, in := 0, op.in
	for i := op.vec; i < len(op.r.Vec); i++ {
		rest := int64(len(op.r.Vec[i]) - in)
		in = 0
		for rest > 0 {
			piece := min(rest, v.segMost, v.most-n)
			if piece == 0 || segs == v.segs {
				return n
			}
			segs++
			n += piece
			rest -= piece
		}
	}
	return n
}

// putLocked puts a command into the virtqueue, and reports false if there is no room.
func (v *vring) putLocked(c *command) bool {
	id, ok := v.drv.Next()
	if !ok {
		v.need = 1
		return false
	}
	slot := v.slots[id*slotBytes:][:slotBytes:slotBytes]
	at := uint64(address(slot))
	h := virtio.BlkHeader{Type: c.kind}
	if c.kind != virtio.BlkFlushCache {
		h.Sector = uint64(c.off) / virtio.SectorBytes
	}
	chain := append(v.chain[:0], virtio.Buffer{Addr: at, Len: virtio.BlkHeaderBytes})
	switch c.kind {
	case virtio.BlkIn, virtio.BlkOut:
		chain = v.payload(chain, c)
	case virtio.BlkDiscardRange, virtio.BlkWriteZeroRange:
		// The range has its place in the payload, and the header's is not used.
		r := virtio.BlkRange{Sector: h.Sector, Sectors: uint32(c.n / virtio.SectorBytes)}
		if c.kind == virtio.BlkWriteZeroRange {
			r.Flags = v.d.zeroFlags
		}
		h.Sector = 0
		r.Put(slot[slotRange:])
		chain = append(chain, virtio.Buffer{Addr: at + slotRange, Len: virtio.BlkRangeBytes})
	}
	chain = append(chain, virtio.Buffer{Addr: at + slotStatus, Len: 1, Write: true})
	v.chain = chain
	h.Put(slot)
	slot[slotStatus] = noStatus
	if !v.drv.Add(chain) {
		v.need = len(chain)
		return false
	}
	v.need = 0
	v.cmds[id] = *c
	return true
}

// payload appends the pieces of the application's memory that a command is about.
func (v *vring) payload(chain []virtio.Buffer, c *command) []virtio.Buffer {
	write := c.kind == virtio.BlkIn
	n, in := c.n, c.in
	for i := c.vec; n > 0; i++ {
		p := c.op.r.Vec[i][in:]
		in = 0
		if int64(len(p)) > n {
			p = p[:n]
		}
		n -= int64(len(p))
		for len(p) > 0 {
			piece := p[:min(int64(len(p)), v.segMost)]
			p = p[len(piece):]
			chain = append(chain, virtio.Buffer{Addr: uint64(address(piece)), Len: uint32(len(piece)), Write: write})
		}
	}
	return chain
}

// takeLocked takes a request out of those that are not wholly in the virtqueue. Before is
// the one before it.
func (v *vring) takeLocked(before, op *operation) {
	if before == nil {
		v.first = op.next
	} else {
		before.next = op.next
	}
	if v.last == op {
		v.last = before
	}
	op.next = nil
	if !op.r.Deadline.IsZero() {
		v.timed--
	}
}

// harvestLocked takes what the back-end has done, and puts more into the virtqueue.
func (v *vring) harvestLocked() {
	for {
		id, _, ok, err := v.drv.Pop()
		if err != nil {
			v.d.broken(v, err)
			return
		}
		if !ok {
			break
		}
		// The status is read once: the back-end may go on to write to it.
		status := v.slots[id*slotBytes+slotStatus]
		c := &v.cmds[id]
		op := c.op
		c.op = nil
		if status != virtio.BlkOK && op.r.Err == nil {
			op.r.Err = v.d.failure(status)
		}
		if op.left--; op.left == 0 && op.cut {
			v.finishLocked(op)
		}
	}
	v.pumpLocked()
}

// finishLocked gives a request back to its queue.
func (v *vring) finishLocked(op *operation) {
	q := op.q
	q.done = append(q.done, op.r)
	q.flying--
	op.r = nil
	op.next, q.free = q.free, op
	q.toldLocked()
}

// endLocked ends what is in no back-end's hands and what match has an error for.
func (v *vring) endLocked(match func(op *operation) error) {
	for before, op := (*operation)(nil), v.first; op != nil; {
		next := op.next
		if err := match(op); err != nil {
			v.takeLocked(before, op)
			v.abandonLocked(op, err)
		} else {
			before = op
		}
		op = next
	}
	// What a back-end that has gone did not complete can be taken back, too, as long as
	// no other one has it. Requests of which a part is there only are in the list above.
	for i := range v.redo {
		if op := v.redo[i].op; op != nil && op.cut {
			if err := match(op); err != nil {
				v.abandonLocked(op, err)
			}
		}
	}
	v.redo = compact(v.redo)
}

// abandonLocked ends a request with what of it is not in the virtqueue.
func (v *vring) abandonLocked(op *operation, err error) {
	if op.r.Err == nil {
		op.r.Err = err
	}
	op.cut = true
	v.need = 0 // another one may be the next
	for i := range v.redo {
		if v.redo[i].op == op {
			v.redo[i].op = nil
			op.left--
		}
	}
	if op.left == 0 {
		v.finishLocked(op)
	}
}

// compact removes commands that are none any more.
func compact(cmds []command) []command {
	keep := cmds[:0]
	for _, c := range cmds {
		if c.op != nil {
			keep = append(keep, c)
		}
	}
	clear(cmds[len(keep):])
	if len(keep) == 0 {
		return nil
	}
	return keep
}

// lateLocked ends what is too late, and returns when the next one will be.
func (v *vring) lateLocked() time.Time {
	if v.timed == 0 && v.redo == nil {
		return time.Time{}
	}
	next := v.expireLocked()
	v.pumpLocked() // there may be room for those behind
	return next
}

func (v *vring) expireLocked() (next time.Time) {
	now := time.Now()
	v.endLocked(func(op *operation) error {
		if err := op.r.Late(now); err != nil {
			return fmt.Errorf("%s: %w", v.d.path, err)
		}
		if t := op.r.Deadline; !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
		return nil
	})
	return next
}

// resetLocked empties the virtqueue. What was in it is to be sent again, in its order.
func (v *vring) resetLocked() {
	for i := range v.cmds {
		if v.cmds[i].op != nil {
			v.redo = append(v.redo, v.cmds[i])
			v.cmds[i] = command{}
		}
	}
	v.need = 0
	slices.SortFunc(v.redo, func(a, b command) int { return cmp.Compare(a.order, b.order) })
	v.drv.Reset()
}

// killLocked ends everything with an error, and what comes later, too.
func (v *vring) killLocked(err error) {
	v.up, v.dead = false, err
	v.resetLocked()
	v.endLocked(func(*operation) error { return err })
}

// downLocked is for when the back-end has gone. If it keeps a record what it had stays
// in the virtqueue, for the next one.
func (v *vring) downLocked(record bool) {
	v.up = false
	v.harvestLocked()
	if !record && v.dead == nil {
		v.resetLocked()
		signal(v.call) // deadlines count again, and who sleeps does not know of them
	}
}

// upLocked is for when a back-end has the virtqueue.
func (v *vring) upLocked() {
	if v.d.fatal.Load() != nil {
		return // it has broken a rule already
	}
	v.up, v.dead = true, nil
	v.pumpLocked()
	// It may have been emptied by the one before without a notice to anybody, and be full
	// without one to this back-end.
	signal(v.kick)
	signal(v.call)
}
