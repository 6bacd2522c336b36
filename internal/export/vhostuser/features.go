package vhostuser

import (
	"math"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// maxSlots is how many pieces of memory a connection may share.
const maxSlots = 256

// offeredProtocol is what every connection is offered of the protocol.
var offeredProtocol = vhost.ProtocolSet(
	vhost.PMultiQueue, vhost.PLogSHMFD, vhost.PReplyAck, vhost.PBackendReq, vhost.PConfig, vhost.PInflightSHMFD,
	vhost.PResetDevice, vhost.PConfigureMemSlots, vhost.PStatus,
)

// offered returns the features of the device.
func (s *Server) offered() virtio.Features {
	f := virtio.Set(
		virtio.FVersion1, virtio.FRingPacked, virtio.FEventIdx, virtio.FIndirectDesc,
		virtio.BlkSizeMax, virtio.BlkSegMax, virtio.BlkBlockSize, virtio.BlkTopology, virtio.BlkFlush, virtio.BlkMultiQueue,
		vhost.FLogAll, vhost.FProtocolFeatures,
	)
	if s.fixed {
		return f | virtio.Set(virtio.BlkReadOnly)
	}
	return f | virtio.Set(virtio.BlkConfigWCE, virtio.BlkDiscard, virtio.BlkWriteZeroes)
}

// maxRange is the most sectors of a discard or of a write of zeroes: 1 GiB.
const maxRange = 1 << 30 / virtio.SectorBytes

// segMax is how many pieces of data a request may have, so that it fits the queue with its
// header and status, and sizeMax how large each may be, so that the whole is at most what a
// volume takes at once.
func (s *Server) segMax() int { return min(s.o.QueueSize, 128) - 2 }

func (s *Server) sizeMax() uint32 { return uint32(block.MaxIO/s.segMax()) &^ (block.Size - 1) }

// config returns the configuration space as a driver sees it now.
func (s *Server) config(writeback bool) virtio.BlkConfig {
	logical := uint32(s.o.BlockSize)
	c := virtio.BlkConfig{
		Capacity: uint64(s.size.Load()) / virtio.SectorBytes, // what requests are compared with
		SizeMax:  s.sizeMax(), SegMax: uint32(s.segMax()), BlockSize: logical,
		// A volume changes whole blocks without reading, and moves whole tracks.
		MinIO: uint16(block.Size / logical), OptIO: uint32(block.TrackBytes / logical),
		Writeback: writeback, Queues: uint16(s.o.Queues),
	}
	for b := uint32(block.Size); b > logical; b /= 2 {
		c.PhysicalExp++
	}
	if !s.fixed {
		c.DiscardSectors, c.DiscardSegments, c.DiscardAlign = maxRange, 1, block.Size/virtio.SectorBytes
		c.WriteZeroesSectors, c.WriteZeroesSegments, c.WriteZeroesMayUnmap = maxRange, 1, true
	}
	return c
}

// span returns the bytes of a range of sectors, or false if it is not one of a volume of
// that many bytes.
func span(sector uint64, n, size int64) (int64, bool) {
	if sector > math.MaxInt64/virtio.SectorBytes {
		return 0, false
	}
	off := int64(sector) * virtio.SectorBytes
	return off, n >= 0 && off <= size && n <= size-off
}
