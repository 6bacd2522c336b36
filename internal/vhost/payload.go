package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrProtocol: the other side has sent what the protocol does not allow. The connection
// cannot be used any more.
var ErrProtocol = errors.New("vhost-user protocol error")

var ne = binary.LittleEndian // of the machines that this runs on

// sized returns an error unless a payload has the size that it must have.
func sized(what string, p []byte, n int) error {
	if len(p) != n {
		return fmt.Errorf("%s of %d bytes, it has %d: %w", what, len(p), n, ErrProtocol)
	}
	return nil
}

// AppendU64 appends a payload of one number.
func AppendU64(b []byte, v uint64) []byte { return ne.AppendUint64(b, v) }

// ParseU64 reads a payload of one number.
func ParseU64(p []byte) (uint64, error) {
	if err := sized("a number", p, 8); err != nil {
		return 0, err
	}
	return ne.Uint64(p), nil
}

// VringState is the payload of SetVringNum, SetVringBase, GetVringBase and SetVringEnable.
//
// The base of a packed queue has in its bits 0 to 14 the index of the next descriptor
// that becomes available and in bit 15 its wrap counter, in bits 16 to 31 the same of the
// next that is used.
type VringState struct {
	Index uint32 // of the queue
	Num   uint32
}

const stateBytes = 8

// Append appends the payload.
func (v VringState) Append(b []byte) []byte {
	return ne.AppendUint32(ne.AppendUint32(b, v.Index), v.Num)
}

// ParseVringState is the reverse of Append.
func ParseVringState(p []byte) (VringState, error) {
	if err := sized("a vring state", p, stateBytes); err != nil {
		return VringState{}, err
	}
	return VringState{Index: ne.Uint32(p), Num: ne.Uint32(p[4:])}, nil
}

// VringAddr is the payload of SetVringAddr. Of a packed queue, Desc is the descriptor
// ring, Avail the driver's event structure and Used the device's.
type VringAddr struct {
	Index uint32
	Flags uint32 // VringLog
	Desc  uint64 // user addresses
	Used  uint64
	Avail uint64
	Log   uint64 // guest address at which the used ring's writes are marked
}

const addrBytes = 40

// Append appends the payload.
func (v VringAddr) Append(b []byte) []byte {
	b = ne.AppendUint32(ne.AppendUint32(b, v.Index), v.Flags)
	b = ne.AppendUint64(ne.AppendUint64(b, v.Desc), v.Used)
	return ne.AppendUint64(ne.AppendUint64(b, v.Avail), v.Log)
}

// ParseVringAddr is the reverse of Append.
func ParseVringAddr(p []byte) (VringAddr, error) {
	if err := sized("a vring address", p, addrBytes); err != nil {
		return VringAddr{}, err
	}
	return VringAddr{
		Index: ne.Uint32(p), Flags: ne.Uint32(p[4:]), Desc: ne.Uint64(p[8:]), Used: ne.Uint64(p[16:]),
		Avail: ne.Uint64(p[24:]), Log: ne.Uint64(p[32:]),
	}, nil
}

// Region is a piece of the front-end's memory, in bytes.
type Region struct {
	Guest  uint64 // address that descriptors use
	Size   uint64
	User   uint64 // address that VringAddr uses
	Offset uint64 // where it begins in the file that comes with it
}

const regionBytes = 32

func (r Region) append(b []byte) []byte {
	b = ne.AppendUint64(ne.AppendUint64(b, r.Guest), r.Size)
	return ne.AppendUint64(ne.AppendUint64(b, r.User), r.Offset)
}

func readRegion(p []byte) Region {
	return Region{Guest: ne.Uint64(p), Size: ne.Uint64(p[8:]), User: ne.Uint64(p[16:]), Offset: ne.Uint64(p[24:])}
}

// AppendMemTable appends the payload of SetMemTable, of at most MaxRegions regions.
func AppendMemTable(b []byte, regions []Region) []byte {
	b = ne.AppendUint64(b, uint64(len(regions)))
	for _, r := range regions {
		b = r.append(b)
	}
	return b
}

// ParseMemTable appends the regions of a SetMemTable to regions. The payload may be longer
// than they are, up to room for MaxRegions, as some front-ends send it.
func ParseMemTable(p []byte, regions []Region) ([]Region, error) {
	if len(p) < 8 {
		return regions, fmt.Errorf("a memory table of %d bytes: %w", len(p), ErrProtocol)
	}
	n := ne.Uint32(p)
	if n > MaxRegions || len(p) < 8+int(n)*regionBytes || len(p) > 8+MaxRegions*regionBytes {
		return regions, fmt.Errorf("a memory table of %d bytes for %d regions, at most %d are possible: %w", len(p), n, MaxRegions, ErrProtocol)
	}
	for i := range int(n) {
		regions = append(regions, readRegion(p[8+i*regionBytes:]))
	}
	return regions, nil
}

// AppendMemRegion appends the payload of AddMemReg and RemMemReg.
func AppendMemRegion(b []byte, r Region) []byte { return r.append(ne.AppendUint64(b, 0)) }

// ParseMemRegion is the reverse of AppendMemRegion.
func ParseMemRegion(p []byte) (Region, error) {
	if err := sized("a memory region", p, 8+regionBytes); err != nil {
		return Region{}, err
	}
	return readRegion(p[8:]), nil
}

// Log is the payload of SetLogBase: where in the file that comes with it the bits of the
// dirty pages are, in bytes.
type Log struct {
	Size   uint64
	Offset uint64
}

// Append appends the payload.
func (l Log) Append(b []byte) []byte { return ne.AppendUint64(ne.AppendUint64(b, l.Size), l.Offset) }

// ParseLog is the reverse of Append.
func ParseLog(p []byte) (Log, error) {
	if err := sized("a log description", p, 16); err != nil {
		return Log{}, err
	}
	return Log{Size: ne.Uint64(p), Offset: ne.Uint64(p[8:])}, nil
}

// ConfigMigration, in Config.Flags, says that the device's state is restored, so that also
// fields are written that a driver may not write.
const ConfigMigration uint32 = 1

// Config is the payload of GetConfig and SetConfig.
type Config struct {
	Offset uint32 // in the configuration space, bytes
	Size   uint32 // bytes
	Flags  uint32
	Data   []byte // Size bytes of the message; in an answer that says no, none
}

// Append appends the payload.
func (c Config) Append(b []byte) []byte {
	b = ne.AppendUint32(ne.AppendUint32(b, c.Offset), c.Size)
	return append(ne.AppendUint32(b, c.Flags), c.Data...)
}

// ParseConfig is the reverse of Append. Data is part of p.
func ParseConfig(p []byte) (Config, error) {
	if len(p) < 12 {
		return Config{}, fmt.Errorf("an access to the configuration space of %d bytes: %w", len(p), ErrProtocol)
	}
	c := Config{Offset: ne.Uint32(p), Size: ne.Uint32(p[4:]), Flags: ne.Uint32(p[8:]), Data: p[12:]}
	if c.Size > MaxConfig || c.Offset > MaxConfig || uint32(len(c.Data)) != c.Size {
		return Config{}, fmt.Errorf("an access to %d bytes at %d of the configuration space with %d bytes, at most %d are possible: %w",
			c.Size, c.Offset, len(c.Data), MaxConfig, ErrProtocol)
	}
	return c, nil
}

// Inflight is the payload of GetInflightFD and SetInflightFD.
type Inflight struct {
	Size      uint64 // of the area, in bytes; 0 in a GetInflightFD
	Offset    uint64 // where it begins in the file that comes with it
	Queues    uint16
	QueueSize uint16
}

const inflightBytes = 20

// Append appends the payload, with the padding that C gives its structure: QEMU demands it.
func (i Inflight) Append(b []byte) []byte {
	b = ne.AppendUint64(ne.AppendUint64(b, i.Size), i.Offset)
	b = ne.AppendUint16(ne.AppendUint16(b, i.Queues), i.QueueSize)
	return append(b, 0, 0, 0, 0)
}

// ParseInflight is the reverse of Append. It takes the payload also without the padding.
func ParseInflight(p []byte) (Inflight, error) {
	if len(p) != inflightBytes {
		if err := sized("an inflight description", p, inflightBytes+4); err != nil {
			return Inflight{}, err
		}
	}
	return Inflight{Size: ne.Uint64(p), Offset: ne.Uint64(p[8:]), Queues: ne.Uint16(p[16:]), QueueSize: ne.Uint16(p[18:])}, nil
}
