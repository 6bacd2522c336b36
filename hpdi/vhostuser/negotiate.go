package vhostuser

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strings"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

const (
	// mostCommand is how many bytes of payload one command has at most.
	mostCommand = 4 << 20
	// mostRange is how many bytes one command discards or fills with zeroes at most.
	mostRange = 1 << 30
	// mostSegments is how many pieces of memory one command has at most.
	mostSegments = 254
	// mostSlots is how many regions are given to a back-end at most.
	mostSlots = 512
	// mostBlock is the largest block size that is taken, in bytes.
	mostBlock = 1 << 20
)

// wanted are the features that this driver knows.
var wanted = virtio.Set(virtio.FVersion1, virtio.FRingPacked, virtio.FEventIdx, virtio.FIndirectDesc, vhost.FProtocolFeatures,
	virtio.BlkSizeMax, virtio.BlkSegMax, virtio.BlkReadOnly, virtio.BlkBlockSize, virtio.BlkFlush, virtio.BlkTopology,
	virtio.BlkConfigWCE, virtio.BlkMultiQueue, virtio.BlkDiscard, virtio.BlkWriteZeroes)

// wantedProtocol are the protocol features that it knows.
var wantedProtocol = vhost.ProtocolSet(vhost.PMultiQueue, vhost.PReplyAck, vhost.PBackendReq, vhost.PConfig, vhost.PInflightSHMFD,
	vhost.PResetDevice, vhost.PConfigureMemSlots, vhost.PStatus)

// offer is what a back-end can do, as far as this driver knows of it.
type offer struct {
	features virtio.Features
	config   virtio.BlkConfig
	queues   int
	slots    int
}

// negotiate finds out what the back-end can do. It sets the connection's protocol features.
func (d *device) negotiate(l *link) (*offer, error) {
	n, err := l.number(vhost.GetFeatures)
	if err != nil {
		return nil, err
	}
	o := &offer{features: virtio.Features(n) & wanted, queues: 1, slots: baseRegions}
	if !o.features.Has(virtio.FVersion1) || !o.features.Has(vhost.FProtocolFeatures) {
		return nil, fmt.Errorf("the back-end offers features %#x: VIRTIO 1.0 (bit %d) and protocol features (bit %d) are needed", n, virtio.FVersion1, vhost.FProtocolFeatures)
	}
	if n, err = l.number(vhost.GetProtocolFeatures); err != nil {
		return nil, err
	}
	proto := vhost.ProtocolFeatures(n) & wantedProtocol
	if !proto.Has(vhost.PConfig) {
		return nil, fmt.Errorf("the back-end offers protocol features %#x: bit %d is needed, without which nobody knows the device's size", n, vhost.PConfig)
	}
	if err := l.send(vhost.SetProtocolFeatures, 0, vhost.AppendU64(nil, uint64(proto))); err != nil {
		return nil, err
	}
	l.proto = proto
	if proto.Has(vhost.PMultiQueue) {
		if n, err = l.number(vhost.GetQueueNum); err != nil {
			return nil, err
		}
		o.queues = int(min(n, mostQueues))
	}
	if proto.Has(vhost.PConfigureMemSlots) {
		if n, err = l.number(vhost.GetMaxMemSlots); err != nil {
			return nil, err
		}
		o.slots = int(min(n, mostSlots))
	}
	if err := l.tell(vhost.SetOwner, nil); err != nil {
		return nil, err
	}
	if o.config, err = l.readConfig(); err != nil {
		return nil, err
	}
	if o.features.Has(virtio.BlkMultiQueue) && o.config.Queues > 0 {
		o.queues = min(o.queues, int(o.config.Queues))
	}
	return o, o.check()
}

// check returns an error unless what a back-end offers can be.
func (o *offer) check() error {
	bs := o.blockSize()
	switch {
	case o.queues < 1:
		return errors.New("the back-end has no queues")
	case o.slots < 2:
		return fmt.Errorf("the back-end takes %d pieces of memory, at least 2 are needed", o.slots)
	case bs < virtio.SectorBytes || bs > mostBlock || bits.OnesCount32(bs) != 1:
		return fmt.Errorf("the back-end has blocks of %d bytes, a power of two from %d to %d is possible", bs, virtio.SectorBytes, mostBlock)
	case o.config.Capacity > math.MaxInt64/virtio.SectorBytes:
		return fmt.Errorf("the back-end has %d sectors, more than can be addressed", o.config.Capacity)
	case o.sizeMax() < bs:
		return fmt.Errorf("the back-end takes segments of %d bytes, less than a block of %d", o.config.SizeMax, bs)
	}
	return nil
}

func (o *offer) blockSize() uint32 {
	if o.features.Has(virtio.BlkBlockSize) {
		return o.config.BlockSize
	}
	return virtio.SectorBytes
}

// sizeMax is the most bytes of a piece of memory. There are back-ends that say to have a
// bound, and that it is 0.
func (o *offer) sizeMax() uint32 {
	if o.features.Has(virtio.BlkSizeMax) && o.config.SizeMax > 0 {
		return o.config.SizeMax
	}
	return math.MaxUint32
}

// segments is how many pieces of memory a command may have in a queue of that size.
func (o *offer) segments(size int) int {
	n := mostSegments
	if o.features.Has(virtio.BlkSegMax) {
		n = max(1, int(min(o.config.SegMax, mostSegments)))
	}
	return min(n, size-2)
}

// segmentBytes is how long each of them may be: whole blocks.
func (o *offer) segmentBytes(block int) int64 {
	return int64(min(o.sizeMax(), mostCommand)) / int64(block) * int64(block)
}

// whole returns the bytes of a number of sectors, up to most and in whole blocks.
func (o *offer) whole(sectors uint32) int64 {
	return min(int64(sectors)*virtio.SectorBytes, mostRange) / int64(o.blockSize()) * int64(o.blockSize())
}

// choose decides what is used of an offer.
func (d *device) choose(o *offer) error {
	f := o.features
	if d.o.Packed == Off || d.o.Packed == Auto && !f.Has(virtio.FRingPacked) {
		f &^= virtio.Set(virtio.FRingPacked)
	} else if !f.Has(virtio.FRingPacked) {
		return errors.New("the back-end has no packed virtqueues: leave packed=on away")
	}
	if err := virtio.CheckSize(d.o.QueueSize, f.Has(virtio.FRingPacked)); err != nil {
		return err
	}
	if d.o.NoEventIdx {
		f &^= virtio.Set(virtio.FEventIdx)
	}
	if d.o.NoIndirect {
		f &^= virtio.Set(virtio.FIndirectDesc)
	}
	cached := f.Has(virtio.BlkFlush)
	if f.Has(virtio.BlkConfigWCE) {
		cached = cached && (o.config.Writeback && d.o.Writeback == Auto || d.o.Writeback == On)
	}
	switch {
	case d.o.Writeback == Off && cached:
		return errors.New("the back-end cannot do without a write cache: leave writeback=off away")
	case d.o.Writeback == On && !cached:
		return errors.New("the back-end cannot have a write cache: leave writeback=on away")
	}
	d.features, d.block, d.flush = f, int(o.blockSize()), cached
	if f.Has(virtio.BlkDiscard) {
		d.mostDiscard = o.whole(o.config.DiscardSectors)
	}
	if f.Has(virtio.BlkWriteZeroes) {
		d.mostZeroes = o.whole(o.config.WriteZeroesSectors)
		if o.config.WriteZeroesMayUnmap {
			d.zeroFlags = virtio.BlkUnmap
		}
	}
	return nil
}

// describe sets the device's information.
func (d *device) describe(l *link, o *offer) {
	readOnly := d.o.ReadOnly || d.features.Has(virtio.BlkReadOnly)
	var notes []string
	if n := len(d.rings); n < d.o.Queues {
		notes = append(notes, fmt.Sprintf("only %d of %d queues: the back-end has no more", n, d.o.Queues))
	}
	if !l.proto.Has(vhost.PInflightSHMFD) {
		notes = append(notes, "the back-end keeps no record of what it has in flight: after its death that is done again")
	}
	if !l.proto.Has(vhost.PBackendReq) {
		notes = append(notes, "the back-end cannot tell that the device has another size")
	}
	d.info.Store(&hpdi.Info{
		Name: "vhost-user:" + d.path, Driver: "vhost-user", Size: size(o, d.block), BlockSize: d.block, SharedMemory: true,
		Discard: d.mostDiscard > 0 && !readOnly, Zeroes: d.mostZeroes > 0 && !readOnly, Durable: !d.flush && !readOnly, ReadOnly: readOnly,
		Rotates: true, Event: true, Cancel: hpdi.CancelQueued, Note: strings.Join(notes, "; "),
	})
}

// size is the capacity in whole blocks.
func size(o *offer, block int) int64 {
	return int64(o.config.Capacity) * virtio.SectorBytes / int64(block) * int64(block)
}

// fits reports why what a back-end offers now is not the device that was opened.
func (d *device) fits(o *offer) error {
	info := d.info.Load()
	switch lost := d.features &^ o.features; {
	case lost != 0:
		return fmt.Errorf("the back-end cannot do any more what features %#x stand for", uint64(lost))
	case o.features.Has(virtio.BlkReadOnly) && !info.ReadOnly:
		return errors.New("the back-end is read-only now")
	case o.features.Has(virtio.BlkFlush) && !d.flush && !d.features.Has(virtio.BlkConfigWCE):
		return errors.New("the back-end has a write cache now, and had none that was to be flushed")
	case int(o.blockSize()) != d.block:
		return fmt.Errorf("the back-end had blocks of %d bytes and has %d now", d.block, o.blockSize())
	case size(o, d.block) < info.Size:
		return fmt.Errorf("the back-end had %d bytes and has %d now", info.Size, size(o, d.block))
	case o.queues < len(d.rings):
		return fmt.Errorf("the back-end has %d queues now, %d are used", o.queues, len(d.rings))
	case o.slots < len(d.mem.Load().regions):
		return fmt.Errorf("the back-end takes %d pieces of memory now, %d are used", o.slots, len(d.mem.Load().regions))
	case o.segments(d.o.QueueSize) < d.rings[0].segs || o.segmentBytes(d.block) < d.rings[0].segMost:
		return fmt.Errorf("the back-end takes %d segments of %d bytes now", o.segments(d.o.QueueSize), o.segmentBytes(d.block))
	case d.mostDiscard > 0 && o.whole(o.config.DiscardSectors) < d.mostDiscard || d.mostZeroes > 0 && o.whole(o.config.WriteZeroesSectors) < d.mostZeroes:
		return errors.New("the back-end discards or writes zeroes to less at once now")
	}
	return nil
}
