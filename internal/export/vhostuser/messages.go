package vhostuser

import (
	"fmt"
	"math"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/eventfd"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// reply is what a handler wants to be sent; the files are closed then.
type reply struct {
	payload []byte
	files   []int
}

func (r *reply) number(v uint64) { r.payload = vhost.AppendU64(nil, v) }

// handlers answer the messages. An error ends the connection.
var handlers map[vhost.Request]func(*client, *vhost.Message, *reply) error

func init() {
	handlers = map[vhost.Request]func(*client, *vhost.Message, *reply) error{
		vhost.GetFeatures:         (*client).getFeatures,
		vhost.SetFeatures:         (*client).setFeatures,
		vhost.GetProtocolFeatures: (*client).getProtocolFeatures,
		vhost.SetProtocolFeatures: (*client).setProtocolFeatures,
		vhost.SetOwner:            (*client).nothing,
		vhost.ResetOwner:          (*client).disableAll,
		vhost.GetQueueNum:         (*client).getQueueNum,
		vhost.GetMaxMemSlots:      (*client).getMaxMemSlots,
		vhost.SetMemTable:         (*client).setMemTable,
		vhost.AddMemReg:           (*client).addMemReg,
		vhost.RemMemReg:           (*client).remMemReg,
		vhost.SetLogBase:          (*client).setLogBase,
		vhost.SetLogFD:            (*client).nothing, // whoever migrates looks at the log anyway
		vhost.SetVringNum:         (*client).setVringNum,
		vhost.SetVringAddr:        (*client).setVringAddr,
		vhost.SetVringBase:        (*client).setVringBase,
		vhost.GetVringBase:        (*client).getVringBase,
		vhost.SetVringEnable:      (*client).setVringEnable,
		vhost.SetVringKick:        (*client).setVringKick,
		vhost.SetVringCall:        (*client).setVringCall,
		vhost.SetVringErr:         (*client).setVringErr,
		vhost.SetBackendReqFD:     (*client).setBackendReqFD,
		vhost.GetConfig:           (*client).getConfig,
		vhost.SetConfig:           (*client).setConfig,
		vhost.GetInflightFD:       (*client).getInflightFD,
		vhost.SetInflightFD:       (*client).setInflightFD,
		vhost.ResetDevice:         (*client).resetDevice,
		vhost.SetStatus:           (*client).setStatus,
		vhost.GetStatus:           (*client).getStatus,
	}
}

func (c *client) nothing(*vhost.Message, *reply) error { return nil }

func (c *client) getFeatures(_ *vhost.Message, r *reply) error {
	r.number(uint64(c.s.offered()))
	return nil
}

func (c *client) setFeatures(m *vhost.Message, _ *reply) error {
	v, err := vhost.ParseU64(m.Payload)
	if err != nil {
		return err
	}
	f := virtio.Features(v)
	if extra := f &^ c.s.offered(); extra != 0 {
		return fmt.Errorf("%w: features %#x, which were not offered", errRule, uint64(extra))
	}
	return c.quietly(func() error {
		c.features = f
		return nil
	})
}

func (c *client) getProtocolFeatures(_ *vhost.Message, r *reply) error {
	r.number(uint64(offeredProtocol))
	return nil
}

func (c *client) setProtocolFeatures(m *vhost.Message, _ *reply) error {
	v, err := vhost.ParseU64(m.Payload)
	if err != nil {
		return err
	}
	f := vhost.ProtocolFeatures(v)
	if extra := f &^ offeredProtocol; extra != 0 {
		return fmt.Errorf("%w: protocol features %#x, which were not offered", errRule, uint64(extra))
	}
	c.protocol = f
	return nil
}

func (c *client) getQueueNum(_ *vhost.Message, r *reply) error {
	r.number(uint64(c.s.o.Queues))
	return nil
}

func (c *client) getMaxMemSlots(_ *vhost.Message, r *reply) error {
	r.number(maxSlots)
	return nil
}

// quietly calls change while no queue runs, and lets those run again that can.
func (c *client) quietly(change func() error) error {
	c.pauseAll()
	if err := change(); err != nil {
		return err
	}
	for _, q := range c.queues {
		if err := q.run(); err != nil {
			return err
		}
	}
	return nil
}

// pauseAll stops all queues with nothing in flight. None takes more while another is waited
// for.
func (c *client) pauseAll() {
	for _, q := range c.queues {
		q.hush()
	}
	for _, q := range c.queues {
		q.pause()
	}
}

func (c *client) setMemTable(m *vhost.Message, _ *reply) error {
	wanted, err := vhost.ParseMemTable(m.Payload, nil)
	if err != nil {
		return err
	}
	fds, err := m.TakeFiles(len(wanted))
	if err != nil {
		return err
	}
	defer closeAll(fds)
	return c.quietly(func() error {
		c.dropMemory()
		sizes := make([]uint64, 0, len(wanted))
		for _, w := range wanted {
			sizes = append(sizes, w.Size)
		}
		if err := c.reserve(sizes...); err != nil {
			return err
		}
		var regions []*region
		for i, w := range wanted {
			r, err := mapRegion(w, fds[i])
			if err != nil {
				unmapAll(regions)
				return err
			}
			regions = append(regions, r)
		}
		if err := c.useMemory(regions); err != nil {
			unmapAll(regions)
			return err
		}
		return nil
	})
}

func (c *client) addMemReg(m *vhost.Message, _ *reply) error {
	w, err := vhost.ParseMemRegion(m.Payload)
	if err != nil {
		return err
	}
	fds, err := m.TakeFiles(1)
	if err != nil {
		return err
	}
	defer closeAll(fds)
	if len(c.regions) >= maxSlots {
		return fmt.Errorf("%w: more than %d pieces of memory", errRule, maxSlots)
	}
	if err := c.reserve(uint64(c.shared), w.Size); err != nil {
		return err
	}
	r, err := mapRegion(w, fds[0])
	if err != nil {
		return err
	}
	if err := c.useMemory(append(slices.Clone(c.regions), r)); err != nil {
		unmap(r.mapping)
		return err
	}
	// Nothing that requests refer to goes away: queues that run need not end what they
	// have, which may take long, and the front-end waits.
	for _, q := range c.queues {
		if q.running {
			q.setMemory()
		} else if err := q.run(); err != nil {
			return err
		}
	}
	return nil
}

func (c *client) remMemReg(m *vhost.Message, _ *reply) error {
	w, err := vhost.ParseMemRegion(m.Payload)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(c.regions, func(r *region) bool { return r.Guest == w.Guest && r.User == w.User && r.Size == w.Size })
	if at < 0 {
		return fmt.Errorf("%w: no memory of %d bytes at guest address %#x and user address %#x", errRule, w.Size, w.Guest, w.User)
	}
	return c.quietly(func() error {
		r := c.regions[at]
		err := c.useMemory(slices.Delete(slices.Clone(c.regions), at, at+1))
		unmap(r.mapping)
		if err != nil {
			return err
		}
		return c.reserve(uint64(c.shared) - r.Size)
	})
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

func unmapAll(regions []*region) {
	for _, r := range regions {
		unmap(r.mapping)
	}
}

// vring returns the queue that a vring state names.
func (c *client) vring(m *vhost.Message) (*queue, uint32, error) {
	v, err := vhost.ParseVringState(m.Payload)
	if err != nil {
		return nil, 0, err
	}
	q, err := c.queue(v.Index)
	return q, v.Num, err
}

func (c *client) queue(index uint32) (*queue, error) {
	if uint64(index) >= uint64(len(c.queues)) {
		return nil, fmt.Errorf("%w: queue %d of %d", errRule, index, len(c.queues))
	}
	return c.queues[index], nil
}

func (c *client) setVringNum(m *vhost.Message, _ *reply) error {
	q, n, err := c.vring(m)
	if err != nil {
		return err
	}
	if n > uint32(c.s.o.QueueSize) {
		return fmt.Errorf("%w: queue %d of %d descriptors, at most %d are possible", errRule, q.index, n, c.s.o.QueueSize)
	}
	q.pause()
	q.size = int(n)
	return q.run()
}

func (c *client) setVringAddr(m *vhost.Message, _ *reply) error {
	v, err := vhost.ParseVringAddr(m.Payload)
	if err != nil {
		return err
	}
	q, err := c.queue(v.Index)
	if err != nil {
		return err
	}
	q.pause()
	q.addr, q.hasAddr = v, true
	return q.run()
}

func (c *client) setVringBase(m *vhost.Message, _ *reply) error {
	q, n, err := c.vring(m)
	if err != nil {
		return err
	}
	q.pause()
	q.base = n
	return q.run()
}

func (c *client) getVringBase(m *vhost.Message, r *reply) error {
	q, _, err := c.vring(m)
	if err != nil {
		return err
	}
	q.stop()
	r.payload = vhost.VringState{Index: uint32(q.index), Num: q.base}.Append(nil)
	return nil
}

func (c *client) setVringEnable(m *vhost.Message, _ *reply) error {
	q, n, err := c.vring(m)
	if err != nil {
		return err
	}
	if n > 1 {
		return fmt.Errorf("%w: queue %d is to be enabled with %d", errRule, q.index, n)
	}
	if q.enabled = n == 1; !q.enabled {
		q.pause()
		return nil
	}
	return q.run()
}

func (c *client) disableAll(*vhost.Message, *reply) error {
	for _, q := range c.queues {
		q.enabled = false
	}
	c.pauseAll()
	return nil
}

// vringFile returns the queue and the eventfd of a message, -1 if there is none.
func (c *client) vringFile(m *vhost.Message) (*queue, int, error) {
	v, err := vhost.ParseU64(m.Payload)
	if err != nil {
		return nil, -1, err
	}
	f := vhost.VringFile(v)
	q, err := c.queue(uint32(f.Index()))
	if err != nil {
		return nil, -1, err
	}
	if f&vhost.NoFile != 0 {
		_, err := m.TakeFiles(0)
		return q, -1, err
	}
	fds, err := m.TakeFiles(1)
	if err != nil {
		return nil, -1, err
	}
	if err := eventfd.Check(fds[0]); err != nil {
		closeAll(fds)
		return nil, -1, fmt.Errorf("queue %d: %w: %w", q.index, errRule, err)
	}
	return q, fds[0], nil
}

func (c *client) setVringKick(m *vhost.Message, _ *reply) error {
	q, fd, err := c.vringFile(m)
	if err != nil {
		return err
	}
	q.pause()
	if err := q.setKick(fd); err != nil {
		return err
	}
	return q.run()
}

func (c *client) setVringCall(m *vhost.Message, _ *reply) error {
	q, fd, err := c.vringFile(m)
	if err == nil {
		q.setCall(fd)
	}
	return err
}

func (c *client) setVringErr(m *vhost.Message, _ *reply) error {
	q, fd, err := c.vringFile(m)
	if err == nil {
		q.setErr(fd)
	}
	return err
}

func (c *client) setBackendReqFD(m *vhost.Message, _ *reply) error {
	if !c.protocol.Has(vhost.PBackendReq) {
		return fmt.Errorf("%w: the feature was not negotiated", errRule)
	}
	fds, err := m.TakeFiles(1)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fds[0]), "vhost-user back-end channel")
	defer func() { _ = f.Close() }()
	conn, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("%w: a descriptor that is no socket: %w", errRule, err)
	}
	back, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return fmt.Errorf("%w: a %T as the back-end's channel", errRule, conn)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.back != nil {
		_ = c.back.Close()
	}
	c.back = back
	return nil
}

func (c *client) getConfig(m *vhost.Message, r *reply) error {
	v, err := vhost.ParseConfig(m.Payload)
	if err != nil {
		return err
	}
	// What lies behind the fields that there are reads as zero: front-ends ask for as
	// much as they know of.
	var space [2 * vhost.MaxConfig]byte
	config := c.s.config(c.writeback.Load())
	config.Put(space[:])
	v.Data = space[v.Offset:][:v.Size]
	v.Flags = 0
	r.payload = v.Append(nil)
	return nil
}

func (c *client) setConfig(m *vhost.Message, _ *reply) error {
	v, err := vhost.ParseConfig(m.Payload)
	if err != nil {
		return err
	}
	if v.Flags&vhost.ConfigMigration != 0 {
		// The other end of a migration had another back-end: of its state only what a
		// driver may write is not our own.
		if at := virtio.BlkConfigWriteback; int(v.Offset) <= at && at < int(v.Offset)+len(v.Data) {
			c.setWriteback(v.Data[at-int(v.Offset)] != 0)
		}
		return nil
	}
	if v.Offset != virtio.BlkConfigWriteback || v.Size != 1 || v.Data[0] > 1 || !c.features.Has(virtio.BlkConfigWCE) {
		return fmt.Errorf("%w: a write of %d bytes at %d of the configuration space, where a driver may write 0 or 1 at %d if that was negotiated",
			errRule, v.Size, v.Offset, virtio.BlkConfigWriteback)
	}
	c.setWriteback(v.Data[0] == 1)
	return nil
}

// setWriteback switches the cache, also for the connections that come after this one with
// the same area.
func (c *client) setWriteback(on bool) {
	c.writeback.Store(on)
	if a := c.inflight.area; a != nil {
		a.SetWritethrough(!on)
	}
}

func (c *client) setLogBase(m *vhost.Message, r *reply) error {
	if !c.protocol.Has(vhost.PLogSHMFD) {
		return fmt.Errorf("%w: a log of dirty pages without a descriptor, which was not negotiated", errRule)
	}
	v, err := vhost.ParseLog(m.Payload)
	if err != nil {
		return err
	}
	fds, err := m.TakeFiles(1)
	if err != nil {
		return err
	}
	defer closeAll(fds)
	d, err := openDirtyLog(fds[0], v)
	if err != nil {
		return err
	}
	err = c.quietly(func() error {
		if old := c.dirty.Swap(d); old != nil {
			old.close()
		}
		return nil
	})
	r.number(0)
	return err
}

func (c *client) resetDevice(*vhost.Message, *reply) error {
	c.pauseAll()
	for _, q := range c.queues {
		q.stop()
		q.enabled, q.base = false, 0
	}
	// The cache stays as it is: front-ends keep what they have told the driver of it.
	c.status = 0
	return nil
}

func (c *client) setStatus(m *vhost.Message, r *reply) error {
	v, err := vhost.ParseU64(m.Payload)
	if err != nil {
		return err
	}
	if v > math.MaxUint8 {
		return fmt.Errorf("%w: device status %#x", errRule, v)
	}
	if c.status = v; v == 0 {
		return c.resetDevice(m, r)
	}
	return nil
}

func (c *client) getStatus(_ *vhost.Message, r *reply) error {
	r.number(c.status)
	return nil
}
