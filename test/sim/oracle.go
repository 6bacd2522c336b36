package sim

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	spool "github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// pool is what the simulation knows of one identity's pool.
type pool struct {
	w          *World
	identity   string
	slot       uint32 // in the guests' caches
	disks      []*disk
	path       string // of the region
	journal    int64  // bytes of the metadata journal
	battery    bool
	acceptLoss bool
	epoch      block.Epoch // of the last owner
	usurped    bool        // somebody has raised the epoch since
	rotted     block.Epoch // the last one after which memory was damaged
	acting     []*proc     // who may touch the devices
	refusal    error       // why it could not be opened last

	volumes map[string]*volume
	unsure  map[string]bool // names that a command under way may make, remove or resize
	ids     map[block.VolumeID]*volume

	region    *region.Region // mapped for looking only
	log       *oplog.View
	shadow    shadow
	powerLost bool // since the pool was open last
	// damaged says that a device took data away that it had accepted:
	// requests may fail, and flushed writes be lost. hindered says that one
	// returned errors.
	damaged, hindered bool
}

// volume is what must be in one volume.
type volume struct {
	name   string
	id     block.VolumeID
	size   int64
	gone   bool                        // deleted: what was under way may still be published
	freed  block.Seq                   // the log's head when its deletion was answered
	blocks map[block.Logical][]version // oldest first; none is zeroes
}

// version is a block's content from a position of the log on. No page is a
// block of zeroes.
type version struct {
	seq  block.Seq
	page *[block.Size]byte
}

// shadow is how far the pool's log was read.
type shadow struct {
	seq     block.Seq // everything published up to here
	flushed block.Seq // a power cut must leave at least this
}

var zeroPage [block.Size]byte

func (v *version) bytes() []byte {
	if v.page == nil {
		return zeroPage[:]
	}
	return v.page[:]
}

// current returns the newest version of a block.
func (v *volume) current(b block.Logical) []byte {
	if h := v.blocks[b]; len(h) > 0 {
		return h[len(h)-1].bytes()
	}
	return zeroPage[:]
}

// refused remembers why the pool did not open. Damage may prevent it, and
// errors of devices while they last; nothing else.
func (pl *pool) refused(err error) {
	pl.refusal = err
	if pl.usurped && errors.Is(err, block.ErrStale) || pl.damaged && errors.Is(err, block.ErrCorrupt) || pl.hindered && errors.Is(err, errMedium) {
		return
	}
	pl.w.violate("the pool of %s does not open: %v", pl.identity, err)
}

// lost tells whether damage keeps the pool shut, or from making consistency
// points, so that its clients wait until somebody repairs it.
func (pl *pool) lost() bool {
	if !pl.damaged {
		return false
	}
	_, t := pl.w.serving(pl.identity)
	return pl.refusal != nil || t != nil && t.pool.Stats().LastError != ""
}

// adopted takes note of a pool that was just opened by t. A log that was
// carried over must hold exactly what was published; after a power cut a
// prefix of it with all that was flushed.
func (w *World) adopted(p *proc, t *tenant) {
	pl := w.pools[t.identity]
	pl.refusal = nil
	pl.unmap()
	r, err := region.Open(pl.path, true)
	if err == nil {
		pl.region = r
		pl.log, err = oplog.OpenView(r.Log())
	}
	if err != nil {
		w.violate("the region of %s: %v", t.identity, err)
		return
	}
	if !pl.powerLost {
		w.observe()
	}
	head := pl.log.Head()
	w.log("%s#%d has the pool of %s at epoch %d, log [%d, %d], consistency point at %d, seen %d, flushed %d",
		p.name, p.inc, t.identity, t.pool.Epoch(), pl.log.Tail(), head, pl.log.Tail(), pl.shadow.seq, pl.shadow.flushed)
	switch {
	case !pl.powerLost && head != pl.shadow.seq:
		w.violate("%s took over the pool of %s with a log up to %d, although %d were published", p.name, t.identity, head, pl.shadow.seq)
	case head > pl.shadow.seq:
		w.violate("the log of %s came back with %d records, only %d were published", t.identity, head, pl.shadow.seq)
	case head < pl.shadow.flushed && !pl.damaged:
		w.violate("after the power cut the log of %s ends at %d, although %d were flushed", t.identity, head, pl.shadow.flushed)
	}
	if pl.powerLost {
		pl.powerLost = false
		pl.truncate(head)
	}
	if t.pool.Epoch() <= pl.epoch {
		w.violate("%s has the pool of %s at epoch %d, although %d was in use", p.name, t.identity, t.pool.Epoch(), pl.epoch)
	}
	pl.epoch, pl.usurped = t.pool.Epoch(), false
	pl.compareVolumes(t.pool)
}

// compareVolumes holds the list of volumes against what was commanded. Of
// commands under way either outcome is right.
func (pl *pool) compareVolumes(p *spool.Pool) {
	there := map[string]bool{}
	for _, v := range p.Volumes() {
		there[v.Name] = true
		known := pl.volumes[v.Name]
		if k := pl.ids[v.ID]; known == nil && k != nil && !k.gone && pl.unsure[k.name] && pl.unsure[v.Name] {
			pl.w.renamed(pl, k, v.Name) // so that command came through
			known = k
		}
		switch {
		case pl.unsure[v.Name]:
		case known == nil:
			pl.w.violate("volume %s of %s is there although it was deleted or never made", v.Name, pl.identity)
		case known.size != v.Size:
			pl.w.violate("volume %s has %d bytes instead of %d", v.Name, v.Size, known.size)
		}
		if known != nil {
			known.id = v.ID
			pl.ids[v.ID] = known
		}
	}
	for _, name := range sortedKeys(pl.volumes) {
		if !there[name] && !pl.unsure[name] {
			pl.w.violate("volume %s of %s is gone", name, pl.identity)
		}
	}
}

// unmap drops the oracle's view of a region.
func (pl *pool) unmap() {
	if pl.region != nil {
		_ = pl.region.Close()
		pl.region, pl.log = nil, nil
	}
}

// truncate forgets what a power cut took.
func (pl *pool) truncate(head block.Seq) {
	for _, v := range pl.volumes {
		for b, h := range v.blocks {
			n := len(h)
			for n > 0 && h[n-1].seq > head {
				n--
			}
			v.blocks[b] = h[:n]
		}
	}
	pl.shadow = shadow{head, head}
	for _, s := range pl.w.sessions() {
		if s.identity != pl.identity {
			continue
		}
		for _, r := range s.flying {
			r.since = min(r.since, head)
			maps.DeleteFunc(r.published, func(_ block.Logical, seq block.Seq) bool { return seq > head })
			r.holes = slices.DeleteFunc(r.holes, func(h hole) bool { return h.seq > head })
		}
	}
}

// observe reads what was published since it was called last.
func (w *World) observe() {
	for _, id := range sortedKeys(w.pools) {
		pl := w.pools[id]
		if pl.log == nil || w.fail != nil {
			continue
		}
		for head := pl.log.Head(); pl.shadow.seq < head; {
			seq := pl.shadow.seq + 1
			rec, err := pl.log.Get(seq)
			if err != nil {
				w.violate("record %d of %s: %v", seq, id, err)
				return
			}
			pl.publish(&rec)
			pl.shadow.seq = seq
		}
	}
}

// publish enters a record into the history, if a request accounts for it.
func (pl *pool) publish(rec *oplog.Record) {
	w := pl.w
	if rec.Kind == oplog.KindNop {
		return
	}
	if pl.usurped {
		w.violate("record %d of %s is published by a guest that does not own the pool any more", rec.Seq, pl.identity)
		return
	}
	v := pl.ids[rec.Volume]
	if v == nil {
		w.violate("record %d of %s is about volume %d, which is not known", rec.Seq, pl.identity, rec.Volume)
		return
	}
	if v.gone {
		return
	}
	var asked []*request // several, if they ask for the same zeroes
	for _, s := range w.sessions() {
		if s.volume != v.name {
			continue
		}
		for _, r := range s.flying {
			if pl.explains(v, r, rec) {
				asked = append(asked, r)
			}
		}
	}
	if len(asked) > 0 {
		pl.enter(v, asked, rec)
		return
	}
	what := rec.Kind.String()
	if rec.Kind == oplog.KindWrite {
		what = describe(pl.log.Payload(rec.First, 1))
	}
	w.violate("record %d of %s changes %d blocks from %d of %s (%s), and no request under way asks for it",
		rec.Seq, pl.identity, rec.Count, rec.LBA, v.name, what)
}

// explains tells whether a request under way asks for exactly this record.
func (pl *pool) explains(v *volume, r *request, rec *oplog.Record) bool {
	if r.op == opRead || r.op == opFlush || r.n == 0 {
		return false
	}
	first, last := block.Logical(r.off/block.Size), block.Logical((r.off+r.n-1)/block.Size)
	end := rec.LBA + block.Logical(rec.Count)
	if rec.LBA < first || end-1 > last {
		return false
	}
	if rec.Kind == oplog.KindZero {
		return r.op != opWrite && int64(rec.LBA) == (r.off+block.Size-1)/block.Size && int64(end) == (r.off+r.n)/block.Size
	}
	var want [block.Size]byte
	payload := pl.log.Payload(rec.First, int(rec.Count))
	for b := rec.LBA; b < end; b++ {
		copy(want[:], v.current(b))
		r.over(want[:], b)
		if !bytes.Equal(want[:], payload[:block.Size]) {
			return false
		}
		payload = payload[block.Size:]
	}
	return true
}

// over changes a block as the request does.
func (r *request) over(page []byte, b block.Logical) {
	at := int64(b) * block.Size
	from, to := max(r.off, at), min(r.off+r.n, at+block.Size)
	if from >= to {
		return
	}
	if r.op == opWrite {
		copy(page[from-at:to-at], r.data[from-r.off:])
	} else {
		clear(page[from-at : to-at])
	}
}

// longHole is the number of blocks from which zeroes are kept as a range.
const longHole = 1 << 12

// enter adds a record to the history of its blocks.
func (pl *pool) enter(v *volume, asked []*request, rec *oplog.Record) {
	end := rec.LBA + block.Logical(rec.Count)
	if rec.Kind == oplog.KindZero && rec.Count >= longHole {
		for _, r := range asked {
			r.holes = append(r.holes, hole{block.Range{Start: rec.LBA, End: end}, rec.Seq})
		}
		for b, h := range v.blocks {
			if b >= rec.LBA && b < end && len(h) > 0 {
				v.blocks[b] = append(h, version{seq: rec.Seq})
			}
		}
		return
	}
	for i := range rec.Count {
		b := rec.LBA + block.Logical(i)
		for _, r := range asked {
			if r.published == nil {
				r.published = map[block.Logical]block.Seq{}
			}
			r.published[b] = rec.Seq
		}
		switch h := v.blocks[b]; {
		case rec.Kind == oplog.KindWrite:
			page := new([block.Size]byte)
			copy(page[:], pl.log.Payload(rec.First+oplog.Extent(i), 1))
			v.blocks[b] = append(h, version{rec.Seq, page})
		case len(h) > 0:
			v.blocks[b] = append(h, version{seq: rec.Seq})
		}
	}
}

// all returns the newest position at which a part of the request was published,
// or the first block that was not.
func (r *request) all() (newest block.Seq, missing block.Logical, ok bool) {
	end := block.Logical((r.off + r.n + block.Size - 1) / block.Size)
	for b := block.Logical(r.off / block.Size); b < end; {
		if seq, ok := r.published[b]; ok {
			newest = max(newest, seq)
			b++
			continue
		}
		i := slices.IndexFunc(r.holes, func(h hole) bool { return h.Start <= b && b < h.End })
		if i < 0 {
			return 0, b, false
		}
		newest = max(newest, r.holes[i].seq)
		b = r.holes[i].End
	}
	return newest, 0, true
}

// answered judges a reply that reached its client.
func (w *World) answered(r *request, data []byte, err error) {
	pl := w.pools[r.s.identity]
	v := pl.volumes[r.s.volume]
	if err != nil {
		r.s.errs = append(r.s.errs, err)
		if len(r.published)+len(r.holes) > 0 && r.tries == 1 && !r.fua { // of a FUA the flush may have failed
			w.violate("%s failed (%v) and took effect", r, err)
		}
		if !pl.mayFail(r, err) {
			w.violate("%s failed: %v%s", r, err, pl.figures())
		}
		return
	}
	switch r.op {
	case opRead:
		pl.judgeRead(v, r, data)
		return
	case opFlush:
		pl.shadow.flushed = max(pl.shadow.flushed, r.arrival)
		return
	}
	newest, missing, ok := r.all()
	if !ok {
		w.violate("%s was acknowledged, but its block %d was not published", r, missing)
	}
	if r.fua {
		pl.shadow.flushed = max(pl.shadow.flushed, newest)
	}
}

// figures says how full the pool is, for messages.
func (pl *pool) figures() string {
	_, t := pl.w.serving(pl.identity)
	if t == nil {
		return ""
	}
	s := t.pool.Stats()
	need, room := pl.need(pl.shadow.seq)
	return fmt.Sprintf(" (needed at most %d of %d blocks; it has %d, free %d, reserved %d, unfolded %d, log %d)", need, room, s.Bytes/block.Size, s.FreeBytes/block.Size,
		s.ReservedBytes/block.Size, s.Unfolded, s.LogUsedBytes/block.Size)
}

// mayFail tells whether an error is what a person would expect now.
func (pl *pool) mayFail(r *request, err error) bool {
	switch {
	case errors.Is(err, block.ErrNoSpace):
		return pl.crowded(r.since)
	case errors.Is(err, errMedium):
		return pl.hindered
	case errors.Is(err, block.ErrCorrupt):
		return pl.damaged
	case errors.Is(err, block.ErrNotFound):
		return pl.unsure[r.s.volume] // it may have another name by now
	case errors.Is(err, block.ErrInvalid):
		return r.off+r.n > pl.volumes[r.s.volume].size
	}
	return false
}

// crowded tells whether the pool may truly have been full at some time since a
// position of its log: with what it had to hold, a log full of new versions,
// and the metadata of both.
func (pl *pool) crowded(since block.Seq) bool {
	need, room := pl.need(since)
	return need > room
}

func (pl *pool) need(since block.Seq) (need, room int64) {
	live, leaves := int64(0), map[string]bool{}
	for id, v := range pl.ids {
		if v.gone && v.freed < since {
			continue
		}
		for b := range v.blocks {
			if v.was(b, since, func(page []byte) bool { return !bytes.Equal(page, zeroPage[:]) }) {
				live++
			}
			leaves[fmt.Sprint(id, b/256)] = true
		}
	}
	const logBlocks = logBytes / block.Size
	track := func(n int64) int64 { return (n + block.TrackBlocks - 1) &^ (block.TrackBlocks - 1) }
	for i, d := range pl.disks {
		first := int64(block.TrackBlocks)
		if i == 0 { // labels and superblocks, journal, flush log (docs/format/label.md)
			first = track(first + pl.journal/block.Size + track(2*logBlocks+block.TrackBlocks))
		}
		room += d.medium.Info().Size/block.Size - first
	}
	room -= room / 8 // kept back for trims, deletes and metadata
	// A leaf has a path above it, and is written anew beside the old one.
	return live + logBlocks + 8*int64(len(leaves)) + 320, room
}

// judgeRead compares what a read brought with what was current at some moment
// while it was under way, block by block.
func (pl *pool) judgeRead(v *volume, r *request, data []byte) {
	for off := r.off; off < r.off+r.n; {
		b := block.Logical(off / block.Size)
		n := min(r.off+r.n-off, int64(b+1)*block.Size-off)
		in := int(off - int64(b)*block.Size)
		got := data[:n]
		if !v.was(b, r.since, func(page []byte) bool { return bytes.Equal(page[in:in+int(n)], got) }) {
			pl.w.violate("%s brought for bytes %d+%d %s; while it was under way block %d held %s",
				r, off, n, describe(got), b, v.told(b, r.since))
			return
		}
		data, off = data[n:], off+n
	}
}

// was tells whether a version that was current since a position satisfies ok.
func (v *volume) was(b block.Logical, since block.Seq, ok func(page []byte) bool) bool {
	h := v.blocks[b]
	for i := len(h) - 1; i >= 0; i-- {
		if ok(h[i].bytes()) {
			return true
		}
		if h[i].seq <= since {
			return false
		}
	}
	return ok(zeroPage[:])
}

func (v *volume) told(b block.Logical, since block.Seq) string {
	s := ""
	v.was(b, since, func(page []byte) bool {
		s += describe(page) + "; "
		return false
	})
	return s
}

// stampSize is the unit in which contents can be told apart.
const stampSize = 64

// stamped returns n bytes for a place that no other request writes.
func stamped(id int, off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		at := off + int64(i)
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], uint64(id)<<40|uint64(at/stampSize)<<8|0x5a)
		p[i] = word[at%8]
	}
	return p
}

// describe says what a piece of content is.
func describe(p []byte) string {
	var parts []string
	last := ""
	for i := 0; i+8 <= len(p); i += 8 {
		s := "zeroes"
		if w := binary.LittleEndian.Uint64(p[i:]); w&0xff == 0x5a {
			s = fmt.Sprintf("request %d", w>>40)
		} else if w != 0 {
			s = fmt.Sprintf("%016x", w)
		}
		if s != last {
			parts = append(parts, fmt.Sprintf("[%d] %s", i, s))
			last = s
		}
		if len(parts) > 6 {
			return fmt.Sprint(append(parts, "..."))
		}
	}
	return fmt.Sprint(parts)
}

// ranges returns the parts of a volume in which something was written, in
// pieces of bounded size, each with a block more on both sides.
func (v *volume) ranges() []block.Range {
	const most = 256
	var out []block.Range
	for _, b := range slices.Sorted(maps.Keys(v.blocks)) {
		if n := len(out); n > 0 && b < out[n-1].End && out[n-1].End-out[n-1].Start < most {
			out[n-1].End = min(b+2, block.Logical(v.size/block.Size))
			continue
		}
		out = append(out, block.Range{Start: max(b, 1) - 1, End: min(b+2, block.Logical(v.size/block.Size))})
	}
	return out
}
