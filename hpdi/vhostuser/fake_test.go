package vhostuser

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// fake is a back-end in this process that a test makes do things: it answers messages, and
// leaves the virtqueues to the test.
type fake struct {
	t    testing.TB
	sock string
	l    *net.UnixListener

	// What it offers; for connections that are made then.
	mu       sync.Mutex // guards all that follows
	features virtio.Features
	proto    vhost.ProtocolFeatures
	config   virtio.BlkConfig
	queues   uint64
	slots    uint64
	answers  map[vhost.Request]answer // in place of its own
	removing func()                   // is called before memory is taken away, with mu held

	conns   []*peer
	arrived sync.Cond // one has come up
}

// answer is what a test has to say to a message: the whole of a reply, and whether the
// connection ends before it.
type answer func(p *peer, m *vhost.Message) (payload []byte, files []int, hang bool)

// peer is one connection of a fake.
type peer struct {
	f     *fake
	sock  *net.UnixConn
	conn  *vhost.Conn
	up    bool // all queues have been enabled
	ended bool

	slots    []virtio.Slot
	features virtio.Features
	rings    map[int]*ring
	saw      []vhost.Request
	backend  *os.File // the socket for requests of its own
	inflight []uint64 // inodes of the areas that it was given, or gave
	writes   []byte   // to the configuration
}

// ring is a virtqueue as it was told.
type ring struct {
	size       int
	base       uint32
	addr       vhost.VringAddr
	kick, call int
}

const fakeBlocks = 1024 // of 512 bytes

// newFake returns a back-end that offers all that the driver knows.
func newFake(t testing.TB) *fake {
	t.Helper()
	dir, err := os.MkdirTemp("", "vu")
	must(t, err)
	f := &fake{
		t: t, sock: filepath.Join(dir, "s"), features: wanted &^ virtio.Set(virtio.BlkReadOnly, virtio.BlkSizeMax),
		proto: wantedProtocol &^ vhost.ProtocolSet(vhost.PInflightSHMFD), queues: 4, slots: 16, answers: map[vhost.Request]answer{},
		config: virtio.BlkConfig{
			Capacity: fakeBlocks, SegMax: 16, BlockSize: 512, Writeback: true, Queues: 4, DiscardSectors: 64, DiscardSegments: 1,
			WriteZeroesSectors: 64, WriteZeroesSegments: 1,
		},
	}
	f.arrived.L = &f.mu
	f.listen()
	t.Cleanup(func() {
		f.refuse()
		must(t, os.RemoveAll(dir))
	})
	return f
}

// set changes what it offers.
func (f *fake) set(change func(f *fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// listen takes connections, each of which is served until it ends.
func (f *fake) listen() {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: f.sock})
	must(f.t, err)
	f.l = l
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			p := &peer{f: f, sock: c, conn: vhost.NewConn(c), rings: map[int]*ring{}}
			f.mu.Lock()
			f.conns = append(f.conns, p)
			f.mu.Unlock()
			go p.serve()
		}
	}()
}

// refuse takes no more connections, and ends those there are.
func (f *fake) refuse() {
	_ = f.l.Close()
	f.mu.Lock()
	conns := slices.Clone(f.conns)
	f.mu.Unlock()
	for _, p := range conns {
		p.end()
	}
}

func (p *peer) end() {
	_ = p.sock.Close()
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	for !p.ended {
		p.f.arrived.Wait()
	}
}

// connected returns connection number n, from 1, when it has come up.
func (f *fake) connected(n int) *peer {
	f.t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { f.arrived.Broadcast() })
	defer timer.Stop()
	begun := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		up := 0
		for _, p := range f.conns {
			if p.up {
				if up++; up == n {
					return p
				}
			}
		}
		if time.Since(begun) > 15*time.Second {
			f.t.Fatalf("connection %d has not come up", n)
		}
		f.arrived.Wait()
	}
}

func (p *peer) serve() {
	defer func() {
		_ = p.sock.Close()
		p.f.mu.Lock()
		defer p.f.mu.Unlock()
		p.ended = true
		if p.backend != nil {
			_ = p.backend.Close()
		}
		for _, s := range p.slots {
			_ = unix.Munmap(s.Mem)
		}
		p.slots = nil
		for _, r := range p.rings {
			_, _ = unix.Close(r.kick), unix.Close(r.call)
		}
		p.rings = nil
		p.f.arrived.Broadcast()
	}()
	var m vhost.Message
	for p.conn.Receive(&m) == nil {
		p.f.mu.Lock()
		p.saw = append(p.saw, m.Request)
		say := p.f.answers[m.Request]
		p.f.mu.Unlock()
		var payload []byte
		var files []int
		hang := false
		if say != nil {
			payload, files, hang = say(p, &m)
		} else {
			payload, files = p.answer(&m)
		}
		if hang {
			m.CloseFiles()
			return
		}
		if payload != nil && p.conn.Send(m.Request, vhost.FlagReply, payload, files...) != nil {
			return
		}
		for _, fd := range files {
			_ = unix.Close(fd)
		}
		m.CloseFiles()
	}
}

// answer does what a message says, and returns the reply.
func (p *peer) answer(m *vhost.Message) (payload []byte, files []int) {
	f := p.f
	f.mu.Lock()
	defer f.mu.Unlock()
	take := func() int {
		files, err := m.TakeFiles(1)
		if err != nil {
			f.t.Error(err)
			return -1
		}
		return files[0]
	}
	queue := func() (*ring, uint32) {
		s, err := vhost.ParseVringState(m.Payload)
		if err != nil {
			f.t.Error(err)
		}
		if p.rings[int(s.Index)] == nil {
			p.rings[int(s.Index)] = &ring{kick: -1, call: -1}
		}
		return p.rings[int(s.Index)], s.Num
	}
	switch m.Request {
	case vhost.GetFeatures:
		return vhost.AppendU64(nil, uint64(f.features)), nil
	case vhost.GetProtocolFeatures:
		return vhost.AppendU64(nil, uint64(f.proto)), nil
	case vhost.GetQueueNum:
		return vhost.AppendU64(nil, f.queues), nil
	case vhost.GetMaxMemSlots:
		return vhost.AppendU64(nil, f.slots), nil
	case vhost.GetConfig:
		b := make([]byte, virtio.BlkConfigBytes)
		f.config.Put(b)
		return vhost.Config{Size: uint32(len(b)), Data: b}.Append(nil), nil
	case vhost.GetVringBase:
		return m.Payload, nil
	case vhost.GetInflightFD:
		fd, err := unix.MemfdCreate("fake", unix.MFD_CLOEXEC)
		if err != nil {
			f.t.Error(err)
		}
		in, err := vhost.ParseInflight(m.Payload)
		if err != nil {
			f.t.Error(err)
		}
		in.Size = 4096
		p.inflight = append(p.inflight, inode(fd))
		return in.Append(nil), []int{fd}
	case vhost.SetInflightFD:
		fd := take()
		p.inflight = append(p.inflight, inode(fd))
		_ = unix.Close(fd)
	case vhost.SetFeatures:
		n, _ := vhost.ParseU64(m.Payload)
		p.features = virtio.Features(n)
	case vhost.SetConfig:
		c, err := vhost.ParseConfig(m.Payload)
		if err != nil || c.Offset != virtio.BlkConfigWriteback || c.Size != 1 {
			f.t.Errorf("a write to the configuration: %+v, %v", c, err)
		} else {
			p.writes = append(p.writes, c.Data[0])
			f.config.Writeback = c.Data[0] == 1
		}
	case vhost.SetBackendReqFD:
		p.backend = os.NewFile(uintptr(take()), "backend")
	case vhost.AddMemReg:
		r, err := vhost.ParseMemRegion(m.Payload)
		if err != nil {
			f.t.Error(err)
		}
		p.addLocked(r, take())
	case vhost.RemMemReg:
		r, err := vhost.ParseMemRegion(m.Payload)
		if err != nil {
			f.t.Error(err)
		}
		if f.removing != nil {
			f.removing()
		}
		p.slots = slices.DeleteFunc(p.slots, func(s virtio.Slot) bool {
			gone := s.Guest == r.Guest
			if gone {
				_ = unix.Munmap(s.Mem)
			}
			return gone
		})
	case vhost.SetMemTable:
		rs, err := vhost.ParseMemTable(m.Payload, nil)
		if err != nil {
			f.t.Error(err)
		}
		for _, s := range p.slots {
			_ = unix.Munmap(s.Mem)
		}
		p.slots = nil
		fds, err := m.TakeFiles(len(rs))
		if err != nil {
			f.t.Error(err)
		}
		for i, r := range rs {
			p.addLocked(r, fds[i])
		}
	case vhost.SetVringNum:
		r, n := queue()
		r.size = int(n)
	case vhost.SetVringBase:
		r, n := queue()
		r.base = n
	case vhost.SetVringAddr:
		a, err := vhost.ParseVringAddr(m.Payload)
		if err != nil {
			f.t.Error(err)
		}
		p.rings[int(a.Index)].addr = a
	case vhost.SetVringKick:
		p.rings[int(m.Payload[0])].kick = take()
	case vhost.SetVringCall:
		p.rings[int(m.Payload[0])].call = take()
	case vhost.SetStatus:
		if n, _ := vhost.ParseU64(m.Payload); n == 0xf {
			p.up = true
			f.arrived.Broadcast()
		}
	}
	if m.NeedReply() {
		return vhost.AppendU64(nil, 0), nil
	}
	return nil, nil
}

func inode(fd int) uint64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}

func (p *peer) addLocked(r vhost.Region, fd int) {
	mem, err := unix.Mmap(fd, int64(r.Offset), int(r.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	_ = unix.Close(fd)
	if err != nil {
		p.f.t.Error(err)
		return
	}
	p.slots = append(p.slots, virtio.Slot{Guest: r.Guest, User: r.User, Mem: mem})
}

// device returns the device's side of a queue.
func (p *peer) device(i int) virtio.Device {
	p.f.t.Helper()
	p.f.mu.Lock()
	r, slots := p.rings[i], slices.Clone(p.slots)
	p.f.mu.Unlock()
	m, err := virtio.NewMemory(slots)
	must(p.f.t, err)
	var d virtio.Device
	if p.features.Has(virtio.FRingPacked) {
		d, err = virtio.NewDevicePacked(m, r.size, p.features, r.addr.Desc, r.addr.Avail, r.addr.Used, r.base)
	} else {
		d, err = virtio.NewDeviceSplit(m, r.size, p.features, r.addr.Desc, r.addr.Avail, r.addr.Used, uint16(r.base))
	}
	must(p.f.t, err)
	return d
}

// next waits for a request.
func (p *peer) next(d virtio.Device) *virtio.Chain {
	p.f.t.Helper()
	c := &virtio.Chain{}
	for begun := time.Now(); ; time.Sleep(100 * time.Microsecond) { // the driver may not notify
		ok, err := d.Next(c)
		must(p.f.t, err)
		if ok {
			return c
		}
		if time.Since(begun) > 10*time.Second {
			p.f.t.Fatal("there is no request")
		}
	}
}

// give completes a request with a status.
func (p *peer) give(i int, d virtio.Device, c *virtio.Chain, status byte) {
	last := c.In[len(c.In)-1]
	last[len(last)-1] = status
	d.Put(c, uint32(c.InBytes))
	d.Publish()
	if d.NeedNotice() {
		p.call(i)
	}
}

func (p *peer) call(i int) {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	if p.rings != nil {
		_, err := unix.Write(p.rings[i].call, binary.LittleEndian.AppendUint64(nil, 1))
		must(p.f.t, err)
	}
}

// tell sends a message to the driver on the socket for that.
func (p *peer) tell(request vhost.Request, flags uint32) error {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	if p.backend == nil {
		return errors.New("there is no socket")
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(request))
	b = binary.LittleEndian.AppendUint32(b, flags|1)
	_, err := p.backend.Write(binary.LittleEndian.AppendUint32(b, 0))
	return err
}

// sawRequest counts messages of a kind.
func (p *peer) sawRequest(r vhost.Request) (n int) {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	for _, s := range p.saw {
		if s == r {
			n++
		}
	}
	return n
}

func pointer(p []byte) uint64 { return uint64(address(p)) }

// guest returns the driver's address of memory that is mapped here.
func (p *peer) guest(b []byte) uint64 {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	for _, s := range p.slots {
		if at := pointer(b) - pointer(s.Mem); at < uint64(len(s.Mem)) {
			return s.Guest + at
		}
	}
	p.f.t.Fatal("memory that the driver has not given")
	return 0
}
