package vhostuser

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// Bits of the device's status (VIRTIO 1.2, section 2.1).
const (
	statusKnown    = 1 | 2 // acknowledged, and there is a driver
	statusFeatures = 8
	statusDriver   = 4
)

// mostInflight bounds the area that a back-end wants to be kept, in bytes.
const mostInflight = 1 << 30

// attach gives a back-end memory, record and virtqueues, and brings the device up.
func (d *device) attach(l *link, o *offer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return hpdi.ErrClosed
	}
	if err := d.pruneLocked(); err != nil {
		return err
	}
	status := func(bits uint64) error {
		if !l.proto.Has(vhost.PStatus) {
			return nil
		}
		return l.tell(vhost.SetStatus, vhost.AppendU64(nil, bits))
	}
	if err := status(statusKnown); err != nil {
		return err
	}
	if err := l.tell(vhost.SetFeatures, vhost.AppendU64(nil, uint64(d.features))); err != nil {
		return err
	}
	if err := status(statusKnown | statusFeatures); err != nil {
		return err
	}
	if d.features.Has(virtio.BlkConfigWCE) {
		// Also where it was left to the back-end: another one may have begun differently.
		v := vhost.Config{Offset: virtio.BlkConfigWriteback, Size: 1, Data: []byte{0}}
		if d.flush {
			v.Data[0] = 1
		}
		if err := l.tell(vhost.SetConfig, v.Append(nil)); err != nil {
			return err
		}
	}
	if err := d.listen(l); err != nil {
		return err
	}
	// From here on it tells when that changes.
	config, err := l.readConfig()
	if err != nil {
		return err
	}
	if err := d.cacheless(config); err != nil {
		return err
	}
	o.config.Capacity = config.Capacity
	if err := l.all(d.mem.Load()); err != nil {
		return err
	}
	if err := d.recordLocked(l); err != nil {
		return err
	}
	for _, v := range d.rings {
		if err := v.start(l); err != nil {
			return fmt.Errorf("queue %d: %w", v.index, err)
		}
	}
	if err := status(statusKnown | statusFeatures | statusDriver); err != nil {
		return err
	}
	d.describe(l, o)
	d.link = l
	d.cur.Store(l)
	for _, v := range d.rings {
		v.mu.Lock()
		v.upLocked()
		v.mu.Unlock()
	}
	if fatal := d.fatal.Load(); fatal != nil {
		d.link = nil
		return *fatal
	}
	return nil
}

// cacheless returns an error if the back-end has a write cache that nobody would flush.
func (d *device) cacheless(config virtio.BlkConfig) error {
	if d.features.Has(virtio.BlkConfigWCE) && !d.flush && config.Writeback {
		return fmt.Errorf("the back-end has its write cache on, and was told to have it off: %w", vhost.ErrProtocol)
	}
	return nil
}

// start gives the back-end a virtqueue.
func (v *vring) start(l *link) error {
	v.mu.Lock()
	base := v.drv.Base()
	v.mu.Unlock()
	n := uint32(v.index)
	for _, m := range []struct {
		request vhost.Request
		payload []byte
		files   []int
	}{
		{vhost.SetVringNum, vhost.VringState{Index: n, Num: uint32(v.d.o.QueueSize)}.Append(nil), nil},
		{vhost.SetVringBase, vhost.VringState{Index: n, Num: base}.Append(nil), nil},
		{vhost.SetVringAddr, vhost.VringAddr{
			Index: n, Desc: uint64(address(v.desc)), Avail: uint64(address(v.driver)), Used: uint64(address(v.device)),
		}.Append(nil), nil},
		{vhost.SetVringCall, vhost.AppendU64(nil, uint64(n)), []int{v.call}},
		{vhost.SetVringKick, vhost.AppendU64(nil, uint64(n)), []int{v.kick}},
		{vhost.SetVringEnable, vhost.VringState{Index: n, Num: 1}.Append(nil), nil},
	} {
		if err := l.tell(m.request, m.payload, m.files...); err != nil {
			return err
		}
	}
	return nil
}

// recordLocked gives the back-end the record of the one before it, or gets one from it. What a
// record does not cover is taken out of the virtqueues, to be sent again.
func (d *device) recordLocked(l *link) error {
	if r := d.inflight; r != nil && l.proto.Has(vhost.PInflightSHMFD) {
		return l.tell(vhost.SetInflightFD, r.d.Append(nil), r.fd)
	}
	d.forgetLocked()
	for _, v := range d.rings {
		v.mu.Lock()
		v.resetLocked()
		v.mu.Unlock()
	}
	if !l.proto.Has(vhost.PInflightSHMFD) {
		return nil
	}
	ask := vhost.Inflight{Queues: uint16(len(d.rings)), QueueSize: uint16(d.o.QueueSize)}
	r, err := l.ask(vhost.GetInflightFD, ask.Append(nil))
	if err != nil {
		return err
	}
	defer r.close()
	got, err := vhost.ParseInflight(r.payload)
	if err == nil && (len(r.files) != 1 || got.Size == 0 || got.Size > mostInflight || got.Queues != ask.Queues || got.QueueSize != ask.QueueSize) {
		err = fmt.Errorf("%d bytes for %d queues of %d with %d descriptors of files, for %d of %d: %w",
			got.Size, got.Queues, got.QueueSize, len(r.files), ask.Queues, ask.QueueSize, vhost.ErrProtocol)
	}
	if err != nil {
		return fmt.Errorf("record of what is in flight: %w", err)
	}
	d.inflight = &record{fd: r.files[0], d: got}
	r.files = nil
	// As QEMU does: some back-ends begin to keep it only now.
	return l.tell(vhost.SetInflightFD, got.Append(nil), d.inflight.fd)
}

// forgetLocked gives the record up.
func (d *device) forgetLocked() {
	d.inflight.close()
	d.inflight = nil
}

// listen gives the back-end a socket on which it tells that its configuration has changed.
func (d *device) listen(l *link) error {
	if !l.proto.Has(vhost.PBackendReq) {
		return nil
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket for the back-end: %w", err)
	}
	err = l.tell(vhost.SetBackendReqFD, nil, fds[1])
	_ = unix.Close(fds[1]) // the back-end has it
	f := os.NewFile(uintptr(fds[0]), "vhost-user back-end requests")
	c, e := net.FileConn(f)
	_ = f.Close() // c is a duplicate
	if err == nil {
		err = e
	}
	if err != nil {
		if e == nil {
			_ = c.Close() // nobody uses it
		}
		return err
	}
	sock := c.(*net.UnixConn)
	d.keeper.Go(func() {
		d.changes(l, sock)
		_ = sock.Close() // the back-end sees it
	})
	d.keeper.Go(func() {
		<-l.gone
		_ = sock.SetReadDeadline(time.Unix(1, 0)) // changes ends
	})
	return nil
}

// changes serves what the back-end tells until the connection ends. What it cannot be
// asked is of no consequence: the device stays as it was.
func (d *device) changes(l *link, sock *net.UnixConn) {
	conn := vhost.NewConn(sock)
	var m vhost.Message
	defer m.CloseFiles()
	for conn.Receive(&m) == nil {
		answer := uint64(1)
		if m.Request == vhost.BackendConfigChange {
			answer = 0
		}
		if m.NeedReply() {
			if sock.SetWriteDeadline(time.Now().Add(d.o.Timeout)) != nil || conn.Send(m.Request, vhost.FlagReply, vhost.AppendU64(nil, answer)) != nil {
				return
			}
		}
		if answer == 0 {
			d.refresh(l)
		}
	}
}

// refresh reads the configuration again. The device's size is what may change.
func (d *device) refresh(l *link) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.link != l {
		return // it is read when the connection is complete
	}
	config, err := l.readConfig()
	if err != nil {
		return // the connection ends
	}
	o := &offer{features: d.features, queues: len(d.rings), slots: d.slots, config: config}
	if err := errors.Join(o.check(), d.cacheless(config)); err != nil {
		l.end(err)
		return
	}
	// A device that has become smaller is as it is, too: requests beyond its end fail here
	// instead of there.
	info := *d.info.Load()
	info.Size = size(o, d.block)
	d.info.Store(&info)
}
