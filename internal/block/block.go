// Package block is the vocabulary of Pollux: the numbers, extents, error kinds
// and the Volume interface that all layers share. It holds no state and
// imports nothing of Pollux.
package block

import "fmt"

// Size is the size in bytes of every logical and physical block.
const Size = 4096

// Shift is log2 of Size.
const Shift = 12

// TrackBlocks is the number of consecutive physical blocks in a track: what
// one seek of a device reaches.
const TrackBlocks = 256

// TrackBytes is the number of bytes in a track: 1 MiB.
const TrackBytes = TrackBlocks * Size

// Logical is the number of a block within a volume.
type Logical uint64

// Physical is the address of a block within a pool: the device's index in the
// upper 16 bits, the block's number on that device in the lower 40.
type Physical uint64

// None is the physical address of a hole.
const None Physical = 0

// physicalShift is where the device index begins in a Physical.
const physicalShift = 40

// MaxDeviceBlocks is the number of blocks of the largest device: 4 PiB.
const MaxDeviceBlocks = 1 << physicalShift

// At returns the address of block n of device dev.
func At(dev int, n uint64) Physical { return Physical(uint64(dev)<<physicalShift | n) }

// Device returns the index of the device that holds p.
func (p Physical) Device() int { return int(p >> physicalShift) }

// Block returns the number of p on its device.
func (p Physical) Block() uint64 { return uint64(p) & (1<<physicalShift - 1) }

// String returns "device:block", as messages show it.
func (p Physical) String() string { return fmt.Sprintf("%d:%d", p.Device(), p.Block()) }

// Seq numbers the records of one pool's operation log from 1. A Seq of 0 is
// the position before the first record.
type Seq uint64

// CP numbers the consistency points of one pool from 1.
type CP uint64

// Epoch numbers the ownerships of one pool: who holds the higher one owns it.
type Epoch uint64

// VolumeID identifies a volume within its pool for ever; it is not reused.
type VolumeID uint32

// keyBits is how many bits of a key number a block: a volume has at most 1<<32.
const keyBits = 32

// Key numbers a block of a volume among those of all volumes of a pool, in the
// order of volumes and, within each, of blocks.
func Key(id VolumeID, lba Logical) uint64 { return uint64(id)<<keyBits | uint64(lba) }

// OfKey returns what Key was given.
func OfKey(key uint64) (VolumeID, Logical) {
	return VolumeID(key >> keyBits), Logical(key % (1 << keyBits))
}

// PoolID is the random identity of a pool.
type PoolID [16]byte

// DeviceID is the random identity of a device of a pool.
type DeviceID [16]byte

// String returns the identity in hexadecimal.
func (id PoolID) String() string { return fmt.Sprintf("%x", id[:]) }

// String returns the identity in hexadecimal.
func (id DeviceID) String() string { return fmt.Sprintf("%x", id[:]) }

// Extent is a range of bytes of a volume and what it holds.
type Extent struct {
	Offset int64
	Length int64
	Hole   bool // reads as zero and takes no space
}
