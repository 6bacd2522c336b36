package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// ring is a split queue as raw bytes, for what no driver would write.
type ring struct {
	m                 *machine
	desc, avail, used []byte
	idx               uint16
}

func (m *machine) raw() *ring {
	desc, driver, device, tables, _ := m.parts()
	return &ring{m: m, desc: m.mem[desc:driver], avail: m.mem[driver:device], used: m.mem[device:tables]}
}

func (r *ring) put(i int, addr uint64, n uint32, flags, next uint16) {
	virtio.PutSplitDesc(r.desc, i, virtio.Desc{Addr: addr, Len: n, Flags: flags, Next: next})
}

// sound makes descriptors 0 to 2 a read that is as it should be.
func (r *ring) sound() {
	virtio.BlkHeader{Type: virtio.BlkIn}.Put(r.m.mem[dataStart:])
	r.put(0, guestBase+dataStart, 16, virtio.DescNext, 1)
	r.put(1, guestBase+dataStart+4096, 4096, virtio.DescNext|virtio.DescWrite, 2)
	r.put(2, guestBase+dataStart+8192, 1, virtio.DescWrite, 0)
}

func (r *ring) give(head uint16) {
	binary.LittleEndian.PutUint16(r.avail[4+2*(int(r.idx)%r.m.size):], head)
	r.idx++
	r.publish()
}

func (r *ring) publish() {
	virtio.Store(r.avail, 0, uint32(r.idx)<<16)
	r.m.vqs[0].notify()
}

// neighbour is a machine that must not notice what others do to the same server.
func neighbour(t *testing.T, s *Server) func() {
	t.Helper()
	m := newMachine(t, s, setup{features: disk | virtio.Set(virtio.FEventIdx)})
	m.start()
	return func() {
		t.Helper()
		for i := range 3 {
			if code := m.vqs[0].do(virtio.BlkIn, uint64(8*i), true, buffer{dataStart, 4096}); code != virtio.BlkOK {
				t.Fatalf("a neighbour's read: status %d", code)
			}
		}
	}
}

// Rings that break a rule end their connection with a message that says which, and nobody
// else's.
func TestHostileRings(t *testing.T) {
	s, _ := newServer(t, Options{Clients: 4})
	unharmed := neighbour(t, s)
	for name, c := range map[string]struct {
		f    virtio.Features
		do   func(r *ring)
		want string
	}{
		"a loop": {0, func(r *ring) {
			r.put(2, guestBase+dataStart+8192, 1, virtio.DescWrite|virtio.DescNext, 1)
			r.give(0)
		}, "a loop in the request that begins with descriptor 0"},
		"a head that is not there":         {0, func(r *ring) { r.give(9999) }, "begins with descriptor 9999 of 32"},
		"a descriptor that leads nowhere":  {0, func(r *ring) { r.put(0, guestBase, 16, virtio.DescNext, 700); r.give(0) }, "descriptor 0 leads to 700 of 32"},
		"memory that is not there":         {0, func(r *ring) { r.put(1, 16, 4096, virtio.DescNext|virtio.DescWrite, 2); r.give(0) }, "descriptor 1: virtqueue is broken"},
		"memory that ends":                 {0, func(r *ring) { r.put(1, guestBase+memBytes-16, 4096, virtio.DescNext|virtio.DescWrite, 2); r.give(0) }, "4080 of 4096 bytes"},
		"a length that overflows":          {0, func(r *ring) { r.put(1, 1<<64-4096, 8192, virtio.DescNext|virtio.DescWrite, 2); r.give(0) }, "not in the driver's memory"},
		"memory to be read behind written": {0, func(r *ring) { r.put(2, guestBase, 1, 0, 0); r.give(0) }, "behind memory to be written"},
		"no header":                        {0, func(r *ring) { r.put(0, guestBase, 5, virtio.DescNext, 1); r.give(0) }, "5 bytes to be read, a header has 16"},
		"no room for the status":           {0, func(r *ring) { r.put(0, guestBase, 16, 0, 0); r.give(0) }, "no room for the status"},
		"an index that jumps":              {0, func(r *ring) { r.idx = 500; r.publish() }, "500 ahead of 0 in a queue of 32"},
		"a head that is taken twice": {0, func(r *ring) {
			r.idx = 2 // both entries of the ring name descriptor 0
			r.publish()
		}, "with which one that is not done begins"},
		"a table that was not negotiated": {0, func(r *ring) { r.put(0, guestBase, 64, virtio.DescIndirect, 0); r.give(0) }, "not negotiated"},
		"a table of odd size":             {1, func(r *ring) { r.put(0, guestBase, 65, virtio.DescIndirect, 0); r.give(0) }, "an indirect table of 65 bytes"},
		"an endless table":                {1, func(r *ring) { r.put(0, guestBase, 1<<20, virtio.DescIndirect, 0); r.give(0) }, "an indirect table of 1048576 bytes"},
		"a table that goes on":            {1, func(r *ring) { r.put(0, guestBase, 64, virtio.DescIndirect|virtio.DescNext, 1); r.give(0) }, "indirect and leads to another"},
		"a table behind the memory":       {1, func(r *ring) { r.put(0, guestBase+memBytes-16, 64, virtio.DescIndirect, 0); r.give(0) }, "not in one piece"},
		"a table in a table": {1, func(r *ring) {
			r.put(0, guestBase+dataStart, 32, virtio.DescIndirect, 0)
			virtio.PutSplitDesc(r.m.mem[dataStart:], 0, virtio.Desc{Addr: guestBase, Len: 16, Flags: virtio.DescIndirect})
			r.give(0)
		}, "refers to another table"},
		"a loop in a table": {1, func(r *ring) {
			r.put(0, guestBase+dataStart, 32, virtio.DescIndirect, 0)
			virtio.PutSplitDesc(r.m.mem[dataStart:], 0, virtio.Desc{Addr: guestBase, Len: 16, Flags: virtio.DescNext})
			r.give(0)
		}, "a loop in an indirect table of 2 descriptors"},
	} {
		t.Run(name, func(t *testing.T) {
			f := disk
			if c.f != 0 {
				f |= virtio.Set(virtio.FIndirectDesc)
			}
			m := newMachine(t, s, setup{features: f})
			m.start()
			r := m.raw()
			r.sound()
			c.do(r)
			err := m.cut()
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "queue 0: ") || !errors.Is(err, virtio.ErrBroken) {
				t.Errorf("the connection ended with %v, not with %q", err, c.want)
			}
			unharmed()
		})
	}
}

// Messages that break a rule end their connection, and leave no descriptor open.
func TestHostileMessages(t *testing.T) {
	s, _ := newServer(t, Options{Clients: 4, Queues: 2, QueueSize: 64, Memory: 1 << 30})
	unharmed := neighbour(t, s)
	state := func(index, num uint32) []byte { return vhost.VringState{Index: index, Num: num}.Append(nil) }
	region := func(guest, size, user, offset uint64) vhost.Region {
		return vhost.Region{Guest: guest, Size: size, User: user, Offset: offset}
	}
	table := func(r ...vhost.Region) []byte { return vhost.AppendMemTable(nil, r) }
	plain := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(plain, make([]byte, 8192), 0o600))
	disk0, err := os.OpenFile(plain, os.O_RDWR, 0)
	must(t, err)
	defer func() { _ = disk0.Close() }()
	pipe := make([]int, 2)
	must(t, unix.Pipe2(pipe, unix.O_CLOEXEC))
	defer func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) }()
	for name, c := range map[string]struct {
		r       vhost.Request
		payload []byte
		files   func(m *machine) []int
		want    string
	}{
		"an unknown request":            {99, nil, nil, "request 99"},
		"features that were not there":  {vhost.SetFeatures, vhost.AppendU64(nil, 1<<63), nil, "not offered"},
		"protocol features":             {vhost.SetProtocolFeatures, vhost.AppendU64(nil, 1<<60), nil, "not offered"},
		"a payload of another request":  {vhost.SetVringNum, vhost.AppendU64(nil, 1)[:4], nil, "4 bytes"},
		"a queue too many":              {vhost.SetVringNum, state(2, 16), nil, "queue 2 of 2"},
		"a queue of great number":       {vhost.SetVringBase, state(1<<31, 16), nil, "queue 2147483648"},
		"a large queue":                 {vhost.SetVringNum, state(0, 128), nil, "128 descriptors, at most 64"},
		"enabled twice":                 {vhost.SetVringEnable, state(0, 2), nil, "enabled with 2"},
		"memory without a file":         {vhost.SetMemTable, table(region(0, 4096, 0, 0)), nil, "0 descriptors"},
		"memory of a file of a disk":    {vhost.SetMemTable, table(region(0, 4096, 0, 0)), func(*machine) []int { return []int{int(disk0.Fd())} }, "must be a memfd"},
		"memory of a pipe":              {vhost.SetMemTable, table(region(0, 4096, 0, 0)), func(*machine) []int { return pipe[:1] }, "must be a memfd"},
		"memory behind its file":        {vhost.SetMemTable, table(region(0, memBytes, 0, 4096)), func(m *machine) []int { return []int{m.fd} }, "of a file of 16777216"},
		"memory that overflows":         {vhost.SetMemTable, table(region(0, 1<<63, 0, 1<<63)), func(m *machine) []int { return []int{m.fd} }, "may share"},
		"memory past all addresses":     {vhost.SetMemTable, table(region(1<<64-4096, 8192, 0, 0)), func(m *machine) []int { return []int{m.fd} }, "past the end"},
		"memory of nothing":             {vhost.SetMemTable, table(region(0, 0, 0, 0)), func(m *machine) []int { return []int{m.fd} }, "0 bytes"},
		"memory twice":                  {vhost.SetMemTable, table(region(0, 8192, 0, 0), region(4096, 8192, 1<<32, 0)), func(m *machine) []int { return []int{m.fd, m.fd} }, "overlap"},
		"memory twice for rings":        {vhost.SetMemTable, table(region(0, 8192, 0, 0), region(1<<32, 8192, 4096, 0)), func(m *machine) []int { return []int{m.fd, m.fd} }, "overlap"},
		"memory that was never there":   {vhost.RemMemReg, vhost.AppendMemRegion(nil, region(1, 2, 3, 4)), nil, "no memory of 2 bytes"},
		"a kick that is no eventfd":     {vhost.SetVringKick, vhost.AppendU64(nil, 0), func(*machine) []int { return pipe[:1] }, "an eventfd is needed"},
		"a call that is a file":         {vhost.SetVringCall, vhost.AppendU64(nil, 1), func(m *machine) []int { return []int{m.fd} }, "an eventfd is needed"},
		"a kick without descriptor":     {vhost.SetVringKick, vhost.AppendU64(nil, 0), nil, "0 descriptors"},
		"no kick with a descriptor":     {vhost.SetVringKick, vhost.AppendU64(nil, uint64(vhost.NoFile)), func(m *machine) []int { return []int{m.vqs[0].kick} }, "1 descriptors"},
		"a channel that is a file":      {vhost.SetBackendReqFD, nil, func(m *machine) []int { return []int{m.fd} }, "no socket"},
		"a log too large":               {vhost.SetLogBase, vhost.Log{Size: 1 << 40}.Append(nil), func(m *machine) []int { return []int{m.fd} }, "at most"},
		"a log behind its file":         {vhost.SetLogBase, vhost.Log{Size: 2 * memBytes}.Append(nil), func(m *machine) []int { return []int{m.fd} }, "of a file of"},
		"a log at an odd place":         {vhost.SetLogBase, vhost.Log{Size: 4096, Offset: 3}.Append(nil), func(m *machine) []int { return []int{m.fd} }, "multiples of 8"},
		"an area for too many queues":   {vhost.GetInflightFD, vhost.Inflight{Queues: 9, QueueSize: 64}.Append(nil), nil, "9 queues"},
		"an area of nobody's":           {vhost.SetInflightFD, vhost.Inflight{Size: uint64(vhost.AreaBytes(1, 32, false)), Queues: 1, QueueSize: 32}.Append(nil), func(m *machine) []int { return []int{m.fd} }, "not made by Pollux"},
		"an area of another size":       {vhost.SetInflightFD, vhost.Inflight{Size: 4096, Queues: 1, QueueSize: 32}.Append(nil), func(m *machine) []int { return []int{m.fd} }, "area of 4096 bytes"},
		"the capacity written":          {vhost.SetConfig, vhost.Config{Size: 8, Data: make([]byte, 8)}.Append(nil), nil, "configuration space"},
		"far in the configuration":      {vhost.GetConfig, vhost.Config{Offset: 1 << 20, Size: 4, Data: make([]byte, 4)}.Append(nil), nil, "configuration space"},
		"a status of more than a byte":  {vhost.SetStatus, vhost.AppendU64(nil, 256), nil, "device status"},
		"descriptors nobody asked for":  {vhost.SetVringNum, state(0, 999), func(m *machine) []int { return []int{m.fd, m.fd, m.fd} }, "999 descriptors"},
		"a memory table for nine":       {vhost.SetMemTable, append(vhost.AppendU64(nil, 9), make([]byte, 9*32)...), nil, "9 regions"},
		"memory for more than is right": {vhost.SetMemTable, table(region(0, 2<<30, 0, 0)), func(m *machine) []int { return []int{bigFile(m)} }, "connections of a disk may share"},
		"memory in pieces for more":     {vhost.SetMemTable, table(region(0, 1<<30, 0, 0), region(1<<32, 4096, 1<<32, 0)), func(m *machine) []int { return []int{bigFile(m), bigFile(m)} }, "connections of a disk may share"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, s, setup{features: disk})
			before := openFiles(t)
			var files []int
			if c.files != nil {
				files = c.files(m)
			}
			extra := openFiles(t) - before
			if err := m.ack(c.r, c.payload, files...); !errors.Is(err, errRefused) {
				t.Errorf("the answer is %v", err)
			}
			if err := m.cut(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the connection ended with %v, not with %q", err, c.want)
			}
			if n := openFiles(t); n-extra > before {
				t.Errorf("%d descriptors are open, %d were", n-extra, before)
			}
			unharmed()
		})
	}
	// Two connections may not share more than one may.
	big := bigFile(newMachine(t, s, setup{}))
	first := newMachine(t, s, setup{})
	must(t, first.ack(vhost.SetMemTable, table(region(0, 1<<30-memBytes, 0, 0)), big))
	second := newMachine(t, s, setup{})
	if err := second.ack(vhost.AddMemReg, vhost.AppendMemRegion(nil, region(0, 4096, 0, 0)), big); !errors.Is(err, errRefused) {
		t.Errorf("a second connection shares more: %v", err)
	}
	if err := second.cut(); err == nil || !strings.Contains(err.Error(), "at most 1073741824 are possible") {
		t.Errorf("the second connection ended with %v", err)
	}
	must(t, first.ack(vhost.RemMemReg, vhost.AppendMemRegion(nil, region(0, 1<<30-memBytes, 0, 0))))
	second = newMachine(t, s, setup{})
	must(t, second.ack(vhost.AddMemReg, vhost.AppendMemRegion(nil, region(0, 4096, 0, 0)), big))
	second.disconnect()
	if n := s.shared.Load(); n != memBytes {
		t.Errorf("%d bytes are shared, the neighbour has %d", n, memBytes)
	}
	if n := mapped.Load(); n != memBytes {
		t.Errorf("%d bytes are mapped, the neighbour has %d", n, memBytes)
	}
}

// bigFile returns a sparse file of more memory than a connection may share.
func bigFile(m *machine) int {
	fd, err := unix.MemfdCreate("big", unix.MFD_CLOEXEC)
	must(m.t, err)
	must(m.t, unix.Ftruncate(fd, 4<<30))
	m.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// Memory that is taken away while it is in use ends that connection.
func TestMemoryPulledAway(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	flushing, flushed := make(chan struct{}), make(chan struct{})
	v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpFlush {
			flushing <- struct{}{}
			<-flushed
		}
		return nil
	}
	s, _ := newServer(t, Options{Volume: v, Clients: 4})
	unharmed := neighbour(t, s)
	for name, do := range map[string]func(m *machine, q *vq){
		"data of a read": func(m *machine, q *vq) {
			q.queue(virtio.BlkIn, 0, true, buffer{dataStart, 4096})
			q.drv.Publish()
			must(m.t, unix.Ftruncate(m.fd, dataStart))
			q.notify()
		},
		"data of a write": func(m *machine, q *vq) {
			q.queue(virtio.BlkOut, 0, false, buffer{dataStart, 4096})
			q.drv.Publish()
			must(m.t, unix.Ftruncate(m.fd, dataStart))
			q.notify()
		},
		"data of a write that waits": func(m *machine, q *vq) {
			q.queue(virtio.BlkGetID, 0, true, buffer{dataStart, 20})
			q.drv.Publish()
			must(m.t, unix.Ftruncate(m.fd, dataStart))
			q.notify()
		},
		"the status of a flush": func(m *machine, q *vq) {
			q.queue(virtio.BlkFlushCache, 0, false)
			q.publish()
			<-flushing
			must(m.t, unix.Ftruncate(m.fd, 0))
			flushed <- struct{}{}
		},
		"the rings": func(m *machine, q *vq) {
			must(m.t, unix.Ftruncate(m.fd, 0))
			q.notify()
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, s, setup{features: disk, unsealed: true})
			m.start()
			do(m, m.vqs[0])
			if err := m.cut(); err == nil || !errors.Is(err, errRule) || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("the connection ended with %v", err)
			}
			unharmed()
		})
	}
}

// Memory that could be taken away works, through private memory.
func TestUnsealed(t *testing.T) {
	s, v := newServer(t, Options{})
	m := newMachine(t, s, setup{features: disk, unsealed: true})
	m.start()
	a := buffer{dataStart, 600 << 10}
	pattern(m.data(a), 3)
	if code := m.vqs[0].do(virtio.BlkOut, 8, false, a); code != virtio.BlkOK {
		t.Fatalf("write: status %d", code)
	}
	clear(m.data(a))
	if code := m.vqs[0].do(virtio.BlkIn, 8, true, a); code != virtio.BlkOK || string(m.data(a)) != string(v.Bytes(4096, 600<<10)) {
		t.Fatalf("read: status %d, or other bytes", code)
	}
}

// A driver that has not read a notice yet finds it, however long its queue takes to stop.
func TestNoticeStays(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	end := make(chan struct{})
	v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpFlush {
			<-end
		}
		return nil
	}
	s, _ := newServer(t, Options{Volume: v})
	m := newMachine(t, s, setup{features: disk})
	m.start()
	q := m.vqs[0]
	q.queue(virtio.BlkFlushCache, 0, false)
	q.drv.Arm(1)
	q.queue(virtio.BlkIn, 0, true, buffer{dataStart, 4096})
	q.publish()
	p := []unix.PollFd{{Fd: int32(q.call), Events: unix.POLLIN}}
	if n, _ := unix.Poll(p, 5000); n != 1 {
		t.Error("no notice of what is done")
	}
	m.send(vhost.GetVringBase, vhost.VringState{}.Append(nil))
	time.Sleep(100 * time.Millisecond)
	if n, _ := unix.Poll(p, 0); n != 1 {
		t.Error("the notice is gone before the driver has read it")
	}
	close(end)
	var a vhost.Message
	must(t, m.vc.Receive(&a))
}

// Whoever kicks without end, or fills the counter of the eventfd that the server writes to,
// harms itself alone, and can be got rid of.
func TestHostileEventfds(t *testing.T) {
	s, _ := newServer(t, Options{Clients: 4})
	unharmed := neighbour(t, s)
	m := newMachine(t, s, setup{features: disk})
	m.start()
	q := m.vqs[0]
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				q.notify()
			}
		}
	}()
	unharmed()
	close(stop)
	<-stopped
	// A counter that is full, and blocks whoever writes to it.
	full := make([]byte, 8)
	binary.LittleEndian.PutUint64(full, 1<<64-2)
	_, err := unix.Write(q.call, full)
	must(t, err)
	must(t, unix.SetNonblock(q.call, false))
	q.queue(virtio.BlkIn, 0, true, buffer{dataStart, 4096})
	q.publish()
	time.Sleep(20 * time.Millisecond)
	unharmed()
	m.disconnect() // which fails the test if the server cannot end it
	// The same for the one that tells of an end by a mistake, which is written to.
	m = newMachine(t, s, setup{features: disk})
	m.start()
	broken := newEventfd(t)
	defer func() { _ = unix.Close(broken) }()
	must(t, m.ack(vhost.SetVringErr, vhost.AppendU64(nil, 0), broken))
	m.raw().give(9999)
	p := []unix.PollFd{{Fd: int32(broken), Events: unix.POLLIN}}
	if n, _ := unix.Poll(p, 5000); n != 1 {
		t.Error("nobody is told of the mistake")
	}
	_ = m.cut()
	m = newMachine(t, s, setup{features: disk})
	m.start()
	must(t, m.ack(vhost.SetVringErr, vhost.AppendU64(nil, 0), broken))
	_, err = unix.Read(broken, make([]byte, 8))
	must(t, err)
	_, err = unix.Write(broken, full)
	must(t, err)
	must(t, unix.SetNonblock(broken, false))
	m.raw().give(9999)
	_ = m.cut()
}

// A front-end that takes no completions, and one that says nothing, hold nobody up.
func TestLazyFrontEnds(t *testing.T) {
	s, _ := newServer(t, Options{Clients: 3, Log: slog.New(slog.DiscardHandler)})
	unharmed := neighbour(t, s)
	m := newMachine(t, s, setup{features: disk})
	m.start()
	q := m.vqs[0]
	for q.drv.InFlight() < 10 {
		q.queue(virtio.BlkIn, 0, true, buffer{dataStart, 4096})
	}
	q.publish()
	silent, theirs := socketpair(t)
	defer func() { _ = silent.Close() }()
	done := make(chan error, 1)
	go func() { done <- s.ServeConn(t.Context(), theirs) }()
	_, _ = silent.Write([]byte{1, 0, 0}) // and nothing more
	unharmed()
	for i := 0; s.Stats().Clients < 3; i++ {
		if i > 1000 {
			t.Fatal("the silent one is not connected")
		}
		time.Sleep(time.Millisecond)
	}
	_, theirs = socketpair(t)
	if err := s.ServeConn(t.Context(), theirs); err == nil || !strings.Contains(err.Error(), "all 3 connections are in use") {
		t.Errorf("a connection too many: %v", err)
	}
	_ = silent.Close()
	<-done
}
