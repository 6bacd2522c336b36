package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/eventfd"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// Addresses of a machine's memory as it tells them.
const (
	guestBase = 0x4000_0000
	userBase  = 0x7000_0000_0000
	ringRoom  = 256 << 10 // of each queue: rings, tables, headers
	dataStart = 4 << 20
	memBytes  = 16 << 20
)

// machine is a front-end, as hostile as its test makes it.
type machine struct {
	t        testing.TB
	server   *Server
	conn     *net.UnixConn
	vc       *vhost.Conn
	served   chan error // what ServeConn returned
	fd       int
	mem      []byte
	features virtio.Features
	size     int // of a queue
	vqs      []*vq
	area     int // descriptor of the in-flight area, -1 without
	shape    vhost.Inflight
	back     *net.UnixConn // our end of the back-end's channel
}

// vq is a queue of a machine with one buffer of memory for each chain.
type vq struct {
	m          *machine
	index      int
	drv        virtio.Driver
	kick, call int
	base       int // offset of its room in the memory
	status     map[int]byte
	wrote      map[int]uint32
	chain      [8]virtio.Buffer
	poll       [1]unix.PollFd
	count      [8]byte
}

type setup struct {
	features virtio.Features // besides VERSION_1 and PROTOCOL_FEATURES
	queues   int
	size     int
	track    bool // with an in-flight area
	unsealed bool
}

// newMachine makes a machine that is not connected.
func newMachine(t testing.TB, s *Server, o setup) *machine {
	t.Helper()
	if o.queues == 0 {
		o.queues = 1
	}
	if o.size == 0 {
		o.size = 32
	}
	fd, err := unix.MemfdCreate("machine", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	must(t, err)
	must(t, unix.Ftruncate(fd, memBytes))
	if !o.unsealed {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
		must(t, err)
	}
	mem, err := unix.Mmap(fd, 0, memBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	m := &machine{
		t: t, server: s, fd: fd, mem: mem, size: o.size, area: -1,
		features: o.features | virtio.Set(virtio.FVersion1, vhost.FProtocolFeatures),
	}
	for i := range o.queues {
		m.vqs = append(m.vqs, m.newVQ(i))
	}
	t.Cleanup(func() {
		m.disconnect()
		_ = unix.Munmap(mem)
		_ = unix.Close(fd)
		if m.area >= 0 {
			_ = unix.Close(m.area)
		}
		for _, q := range m.vqs {
			_, _ = unix.Close(q.kick), unix.Close(q.call)
		}
	})
	m.connect()
	if o.track {
		m.getArea()
	}
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// parts returns where the parts of a queue's ring begin in its room.
func (m *machine) parts() (desc, driver, device, tables, heads int) {
	return 0, 32 << 10, 64 << 10, 96 << 10, 200 << 10
}

func (m *machine) newVQ(i int) *vq {
	q := &vq{m: m, index: i, base: i * ringRoom, status: map[int]byte{}, wrote: map[int]uint32{}}
	q.kick, q.call = newEventfd(m.t), newEventfd(m.t)
	q.newDriver()
	return q
}

func (q *vq) newDriver() {
	desc, driver, device, tables, _ := q.m.parts()
	room := q.m.mem[q.base:][:ringRoom]
	var err error
	q.drv, err = virtio.NewDriver(virtio.DriverOptions{
		Size: q.m.size, Features: q.m.features, Desc: room[desc:driver], Driver: room[driver:device], Device: room[device:tables],
		Tables: room[tables : 200<<10], TablesAddr: guestBase + uint64(q.base+tables), Chain: 8,
	})
	must(q.m.t, err)
}

func newEventfd(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	must(t, err)
	return fd
}

// connect connects to the server and negotiates.
func (m *machine) connect() {
	t := m.t
	t.Helper()
	ours, theirs := socketpair(t)
	m.conn, m.vc = ours, vhost.NewConn(ours)
	_ = ours.SetDeadline(time.Now().Add(20 * time.Second))
	served, server := make(chan error, 1), m.server
	m.served = served
	go func() { served <- server.ServeConn(context.Background(), theirs) }()
	offered := m.number(vhost.GetFeatures)
	if extra := m.features &^ virtio.Features(offered); extra != 0 {
		t.Fatalf("features %#x are not offered", uint64(extra))
	}
	p := vhost.ProtocolFeatures(m.number(vhost.GetProtocolFeatures))
	m.send(vhost.SetProtocolFeatures, vhost.AppendU64(nil, uint64(p)))
	m.send(vhost.SetOwner, nil)
	must(t, m.ack(vhost.SetFeatures, vhost.AppendU64(nil, uint64(m.features))))
}

// disconnect ends the connection and waits until the server is done with it.
func (m *machine) disconnect() {
	if m.conn == nil {
		return
	}
	_ = m.conn.Close()
	m.conn = nil
	if m.back != nil {
		_ = m.back.Close()
		m.back = nil
	}
	select {
	case <-m.served:
	case <-time.After(20 * time.Second):
		m.t.Error("the server does not end a connection")
	}
}

// cut waits until the server has cut the connection, and returns why.
func (m *machine) cut() error {
	m.t.Helper()
	select {
	case err := <-m.served:
		_ = m.conn.Close()
		m.conn = nil
		return err
	case <-time.After(10 * time.Second):
		m.t.Fatal("the server does not cut the connection")
		return nil
	}
}

func (m *machine) send(r vhost.Request, payload []byte, files ...int) {
	m.t.Helper()
	must(m.t, m.vc.Send(r, 0, payload, files...))
}

var errRefused = errors.New("refused")

// ack sends a message and waits for the server's word on it.
func (m *machine) ack(r vhost.Request, payload []byte, files ...int) error {
	if err := m.vc.Send(r, vhost.FlagNeedReply, payload, files...); err != nil {
		return err
	}
	v, err := m.receive(r)
	if err == nil && v != 0 {
		return errRefused
	}
	return err
}

func (m *machine) receive(r vhost.Request) (uint64, error) {
	var a vhost.Message
	if err := m.vc.Receive(&a); err != nil {
		return 0, err
	}
	defer a.CloseFiles()
	if a.Request != r || a.Flags&vhost.FlagReply == 0 {
		return 0, fmt.Errorf("%v answers %v", a.Request, r)
	}
	return vhost.ParseU64(a.Payload)
}

// number sends a message that is answered with a number.
func (m *machine) number(r vhost.Request) uint64 {
	m.t.Helper()
	m.send(r, nil)
	v, err := m.receive(r)
	must(m.t, err)
	return v
}

// getArea asks for an in-flight area.
func (m *machine) getArea() {
	m.t.Helper()
	m.send(vhost.GetInflightFD, vhost.Inflight{Queues: uint16(len(m.vqs)), QueueSize: uint16(m.size)}.Append(nil))
	var a vhost.Message
	must(m.t, m.vc.Receive(&a))
	v, err := vhost.ParseInflight(a.Payload)
	must(m.t, err)
	fds, err := a.TakeFiles(1)
	must(m.t, err)
	m.area, m.shape = fds[0], v
}

// memory gives the machine's memory to the server.
func (m *machine) memory() {
	m.t.Helper()
	must(m.t, m.ack(vhost.SetMemTable, vhost.AppendMemTable(nil, []vhost.Region{{Guest: guestBase, Size: memBytes, User: userBase}}), m.fd))
}

// start gives memory and queues to the server, each where it is now.
func (m *machine) start() {
	m.t.Helper()
	if m.area >= 0 {
		must(m.t, m.ack(vhost.SetInflightFD, m.shape.Append(nil), m.area))
	}
	m.memory()
	for _, q := range m.vqs {
		must(m.t, q.start(q.drv.Base()))
	}
}

func (q *vq) start(base uint32) error {
	m := q.m
	desc, driver, device, _, _ := m.parts()
	at := func(off int) uint64 { return userBase + uint64(q.base+off) }
	i := uint32(q.index)
	for _, x := range []struct {
		r vhost.Request
		p []byte
		f []int
	}{
		{vhost.SetVringNum, vhost.VringState{Index: i, Num: uint32(m.size)}.Append(nil), nil},
		{vhost.SetVringBase, vhost.VringState{Index: i, Num: base}.Append(nil), nil},
		{vhost.SetVringAddr, vhost.VringAddr{Index: i, Desc: at(desc), Avail: at(driver), Used: at(device)}.Append(nil), nil},
		{vhost.SetVringCall, vhost.AppendU64(nil, uint64(i)), []int{q.call}},
		{vhost.SetVringKick, vhost.AppendU64(nil, uint64(i)), []int{q.kick}},
		{vhost.SetVringEnable, vhost.VringState{Index: i, Num: 1}.Append(nil), nil},
	} {
		if err := m.ack(x.r, x.p, x.f...); err != nil {
			return fmt.Errorf("%v: %w", x.r, err)
		}
	}
	return nil
}

// stop ends a queue as a front-end does, and returns its base.
func (q *vq) stop() uint32 {
	q.m.t.Helper()
	q.m.send(vhost.GetVringBase, vhost.VringState{Index: uint32(q.index)}.Append(nil))
	var a vhost.Message
	must(q.m.t, q.m.vc.Receive(&a))
	v, err := vhost.ParseVringState(a.Payload)
	must(q.m.t, err)
	return v.Num
}

// buffer is a piece of the machine's memory for data.
type buffer struct {
	off, n int
}

func (m *machine) data(b buffer) []byte { return m.mem[b.off:][:b.n] }

// queue puts a request into the ring; the server does not see it before publish.
func (q *vq) queue(kind uint32, sector uint64, write bool, data ...buffer) int {
	q.m.t.Helper()
	_, _, _, _, heads := q.m.parts()
	id, ok := q.drv.Next()
	if !ok {
		q.m.t.Fatal("the ring is full")
	}
	head := q.base + heads + 64*id
	virtio.BlkHeader{Type: kind, Sector: sector}.Put(q.m.mem[head:])
	q.m.mem[head+32] = 0xee
	c := append(q.chain[:0], virtio.Buffer{Addr: guestBase + uint64(head), Len: virtio.BlkHeaderBytes})
	for _, b := range data {
		c = append(c, virtio.Buffer{Addr: guestBase + uint64(b.off), Len: uint32(b.n), Write: write})
	}
	c = append(c, virtio.Buffer{Addr: guestBase + uint64(head+32), Len: 1, Write: true})
	if !q.drv.Add(c) {
		q.m.t.Fatal("the ring takes no more")
	}
	return id
}

func (q *vq) publish() {
	if q.drv.Publish() {
		q.notify()
	}
}

func (q *vq) notify() {
	eventfd.Count(q.kick)
}

// pop takes completions from the ring.
func (q *vq) pop() int {
	q.m.t.Helper()
	n, err := q.tryPop()
	must(q.m.t, err)
	return n
}

func (q *vq) tryPop() (int, error) {
	_, _, _, _, heads := q.m.parts()
	n := 0
	for {
		id, wrote, ok, err := q.drv.Pop()
		if !ok || err != nil {
			return n, err
		}
		n++
		q.status[id], q.wrote[id] = q.m.mem[q.base+heads+64*id+32], wrote
	}
}

// wait waits until a request is done, and returns its status.
func (q *vq) wait(id int) byte {
	q.m.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		q.pop()
		if s, ok := q.status[id]; ok {
			delete(q.status, id)
			return s
		}
		if time.Now().After(deadline) {
			q.m.t.Fatalf("request %d of queue %d is not done", id, q.index)
		}
		if !q.drv.Arm(1) {
			continue
		}
		q.called()
	}
}

// called waits for the server's notice, for a while.
func (q *vq) called() {
	q.poll[0] = unix.PollFd{Fd: int32(q.call), Events: unix.POLLIN}
	if n, _ := unix.Poll(q.poll[:], 100); n > 0 {
		_, _ = unix.Read(q.call, q.count[:])
	}
}

// do does a request and returns its status.
func (q *vq) do(kind uint32, sector uint64, write bool, data ...buffer) byte {
	q.m.t.Helper()
	id := q.queue(kind, sector, write, data...)
	q.publish()
	return q.wait(id)
}

func socketpair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		must(t, err)
		_ = f.Close()
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

// pattern fills b with bytes that tell seed and place.
func pattern(b []byte, seed uint32) {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint32(b[i:], seed)
		binary.LittleEndian.PutUint32(b[i+4:], uint32(i))
	}
}

func patterned(n int, seed uint32) []byte {
	b := make([]byte, n)
	pattern(b, seed)
	return b
}

// layouts runs a test for each layout of queues that can be negotiated.
func layouts(t *testing.T, f func(t *testing.T, features virtio.Features)) {
	for _, packed := range []bool{false, true} {
		for _, event := range []bool{false, true} {
			for _, indirect := range []bool{false, true} {
				var features virtio.Features
				name := "split"
				if packed {
					features, name = features|virtio.Set(virtio.FRingPacked), "packed"
				}
				if event {
					features, name = features|virtio.Set(virtio.FEventIdx), name+"-event"
				}
				if indirect {
					features, name = features|virtio.Set(virtio.FIndirectDesc), name+"-indirect"
				}
				t.Run(name, func(t *testing.T) { f(t, features) })
			}
		}
	}
}

// logged collects what a server logs.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// regionOf is the machine's memory as one region.
func regionOf(m *machine) vhost.Region {
	return vhost.Region{Guest: guestBase, Size: memBytes, User: userBase}
}

// take gives the machine's in-flight area to a back-end, as a message does.
func (d *doomed) take(m *machine) error {
	ours, theirs := socketpair(m.t)
	defer func() { _, _ = ours.Close(), theirs.Close() }()
	if err := vhost.NewConn(ours).Send(vhost.SetInflightFD, 0, m.shape.Append(nil), m.area); err != nil {
		return err
	}
	var a vhost.Message
	if err := vhost.NewConn(theirs).Receive(&a); err != nil {
		return err
	}
	return d.c.setInflightFD(&a, nil)
}
