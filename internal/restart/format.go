package restart

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// recordVersion is the version of records; docs/format/restart.md describes it. A record of another
// one is not used.
const recordVersion = 1

// MaxBytes is the length of the longest record.
const MaxBytes = 4 << 20

// Limits of what a record may hold, so that a damaged one is found out before memory is
// taken for it.
const (
	maxDevices = 64
	maxCopies  = 16
)

// Flags of a file.
const (
	flagBlock = 1 << iota
	flagDirect
	flagDiscard
	flagZeroes
	flagDurable
	flagRotates
	allFlags = 1<<iota - 1
)

// Least bytes of what a record has several of.
const (
	sectionSize = 4 + 8 + 8
	fileMin     = 2 + 8*4 + 4 + 2 + 2 + 2
	deviceMin   = 4 + 16 + 2 + 8 + 8 + 4 + 4
	volumeMin   = 4 + 8 + 2 + 1 + 2
)

// Encode returns the sealed record. It fails for one that is too long.
func (r *Record) Encode() ([]byte, error) {
	if s, long := r.tooLong(); long {
		return nil, fmt.Errorf("restart record of pool %s cannot be stored: a text of %d bytes, %.40q...: %w", r.Name, len(s), s, block.ErrInvalid)
	}
	le := binary.LittleEndian
	b := make([]byte, ondisk.HeaderSize, 64<<10)
	b = le.AppendUint64(b, uint64(r.Written.UnixNano()))
	for _, s := range []string{r.Program, r.BootID, r.Identity, r.Name, r.Region} {
		b = ondisk.AppendString(b, s)
	}
	b = appendBytes(b, []byte(r.Settings))
	b = append(le.AppendUint64(b, r.IndexBytes), r.Threshold)
	b = le.AppendUint64(b, r.Generation)
	b = le.AppendUint32(b, uint32(len(r.Superblocks)))
	for _, at := range r.Superblocks {
		b = le.AppendUint64(b, at)
	}
	b = le.AppendUint32(b, uint32(len(r.Sections)))
	for _, s := range r.Sections {
		b = le.AppendUint32(b, s.Kind)
		b = le.AppendUint64(b, uint64(s.Offset))
		b = le.AppendUint64(b, uint64(s.Length))
	}
	b = le.AppendUint32(b, uint32(len(r.Devices)))
	for i := range r.Devices {
		b = r.Devices[i].append(b)
	}
	b = le.AppendUint32(b, uint32(len(r.Volumes)))
	for _, v := range r.Volumes {
		b = le.AppendUint32(b, uint32(v.ID))
		b = le.AppendUint64(b, uint64(v.Size))
		b = le.AppendUint16(b, uint16(v.Run))
		b = append(b, byteOf(v.ReadOnly))
		b = ondisk.AppendString(b, v.Name)
	}
	if len(b) > MaxBytes {
		return nil, fmt.Errorf("restart record of %d bytes, at most %d: %w", len(b), MaxBytes, block.ErrInvalid)
	}
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindRestart, Version: recordVersion, Length: len(b), Pool: r.Pool, Epoch: r.Epoch, Generation: r.Number})
	if _, err := Decode(b); err != nil {
		return nil, fmt.Errorf("restart record of pool %s cannot be stored: %w", r.Name, err)
	}
	return b, nil
}

// tooLong returns a text that does not fit its place, which would be read as something else.
func (r *Record) tooLong() (string, bool) {
	texts := []string{r.Program, r.BootID, r.Identity, r.Name, r.Region}
	for _, d := range r.Devices {
		for _, c := range d.Copies {
			texts = append(texts, c.Path, c.File.Driver, c.File.Note)
		}
	}
	for _, v := range r.Volumes {
		texts = append(texts, v.Name)
	}
	i := slices.IndexFunc(texts, func(s string) bool { return len(s) > math.MaxUint16 })
	if i < 0 {
		return "", false
	}
	return texts[i], true
}

func byteOf(on bool) byte {
	if on {
		return 1
	}
	return 0
}

func appendBytes(b, p []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(p))), p...)
}

func (d *Device) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(d.Index))
	b = append(append(b, d.ID[:]...), d.State, d.Class)
	b = le.AppendUint64(b, d.Blocks)
	b = le.AppendUint64(b, d.First)
	b = appendBytes(b, d.Label)
	b = le.AppendUint32(b, uint32(len(d.Copies)))
	for _, c := range d.Copies {
		f := &c.File
		flags := uint16(0)
		for bit, on := range map[uint16]bool{flagBlock: f.Block, flagDirect: f.Direct, flagDiscard: f.Discard,
			flagZeroes: f.Zeroes, flagDurable: f.Durable, flagRotates: f.Rotates} {
			if on {
				flags |= bit
			}
		}
		b = le.AppendUint16(b, flags)
		for _, v := range []uint64{f.Device, f.Inode, f.Born, uint64(f.Size)} {
			b = le.AppendUint64(b, v)
		}
		b = le.AppendUint32(b, uint32(f.BlockSize))
		for _, s := range []string{c.Path, f.Driver, f.Note} {
			b = ondisk.AppendString(b, s)
		}
	}
	return b
}

// Decode returns the record at the beginning of b. It believes nothing that a record cannot
// be: what it returns can be encoded again. Kinds of error: ondisk.ErrMagic where there is
// none, ondisk.ErrVersion and ondisk.ErrChecksum.
func Decode(b []byte) (*Record, error) {
	h, err := ondisk.Open(b, ondisk.KindRestart, recordVersion)
	if err != nil {
		return nil, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:h.Length])
	r := &Record{Number: h.Generation, Pool: h.Pool, Epoch: h.Epoch, Written: time.Unix(0, int64(d.U64())).UTC()}
	r.Program, r.BootID, r.Identity, r.Name, r.Region = d.String(), d.String(), d.String(), d.String(), d.String()
	r.Settings = string(d.Bytes(d.Count(1)))
	r.IndexBytes, r.Threshold = d.U64(), byteAt(d)
	r.Generation = d.U64()
	for range d.Count(8) {
		r.Superblocks = append(r.Superblocks, d.U64())
	}
	for range d.Count(sectionSize) {
		s := Section{Kind: d.U32(), Offset: int64(d.U64()), Length: int64(d.U64())}
		if s.Offset < 0 || s.Length <= 0 {
			d.Fail("section of %d bytes at %d", s.Length, s.Offset)
		}
		r.Sections = append(r.Sections, s)
	}
	n := d.Count(deviceMin)
	if n == 0 || n > maxDevices {
		d.Fail("%d devices", n)
	}
	last := -1
	for range n {
		dev := decodeDevice(d)
		if dev.Index <= last || dev.Index >= maxDevices {
			d.Fail("device %d after %d", dev.Index, last)
		}
		last = dev.Index
		r.Devices = append(r.Devices, dev)
	}
	for range d.Count(volumeMin) {
		v := Volume{ID: block.VolumeID(d.U32()), Size: int64(d.U64()), Run: int(d.U16())}
		ro := byteAt(d)
		v.ReadOnly, v.Name = ro == 1, d.String()
		if ro > 1 || v.Size <= 0 || v.Name == "" {
			d.Fail("volume %d of %d bytes", v.ID, v.Size)
		}
		r.Volumes = append(r.Volumes, v)
	}
	if d.Len() > 0 {
		d.Fail("%d bytes behind the volumes", d.Len())
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("restart record: %w", err)
	}
	return r, nil
}

func byteAt(d *ondisk.Decoder) byte {
	if b := d.Bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func decodeDevice(d *ondisk.Decoder) Device {
	dev := Device{Index: int(d.U32())}
	copy(dev.ID[:], d.Bytes(len(dev.ID)))
	dev.State, dev.Class = byteAt(d), byteAt(d)
	dev.Blocks, dev.First = d.U64(), d.U64()
	dev.Label = slices.Clone(d.Bytes(d.Count(1)))
	n := d.Count(fileMin)
	if n == 0 || n > maxCopies {
		d.Fail("device %d has %d copies", dev.Index, n)
		return dev
	}
	for range n {
		var c Copy
		f := &c.File
		flags := d.U16()
		f.Block, f.Direct, f.Discard = flags&flagBlock != 0, flags&flagDirect != 0, flags&flagDiscard != 0
		f.Zeroes, f.Durable, f.Rotates = flags&flagZeroes != 0, flags&flagDurable != 0, flags&flagRotates != 0
		f.Device, f.Inode, f.Born, f.Size = d.U64(), d.U64(), d.U64(), int64(d.U64())
		f.BlockSize = int(d.U32())
		c.Path, f.Driver, f.Note = d.String(), d.String(), d.String()
		if flags&^allFlags != 0 || f.Size <= 0 || f.BlockSize <= 0 || c.Path == "" {
			d.Fail("copy %q with flags %#x and %d bytes", c.Path, flags, f.Size)
		}
		dev.Copies = append(dev.Copies, c)
	}
	return dev
}
