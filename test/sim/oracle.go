package sim

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/oplog"
	spool "github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// pool is what the simulation knows of one identity's pool.
type pool struct {
	w        *World
	identity string
	disks    []*disk
	copies   int // of each block: so many disks that follow each other are a mirror
	// candidate are disks that may be part of the pool, or become it: one, or a mirror.
	candidate []*disk
	path      string // of the region
	journal   int64  // bytes of the metadata journal
	battery   bool
	epoch     block.Epoch // of the last owner
	named     block.Epoch // the last one that surely is on the devices: its owner made the region or a consistency point
	made      string      // id of the region
	point     block.CP    // the last one before the last owner
	usurped   bool        // somebody has raised the epoch since
	rotted    block.Epoch // the last one after which memory was damaged
	acting    []*proc     // who may touch the devices
	refusal   error       // why it could not be opened last

	volumes map[string]*volume
	unsure  map[string]bool // names that a command under way may make, remove or resize
	ids     map[block.VolumeID]*volume

	region    *region.Region // mapped for looking only
	log       *oplog.View
	shadow    shadow
	change    *request // whose records are published
	rest      uint64   // of them
	powerLost bool     // since the pool was open last
	moves     int64    // blocks that cleaners, scans and removals moved
	empties   bool     // a disk was to leave: what is on it is written elsewhere
	flashed   flashed
	pins      map[pinned]bool // that are there, or not, as somebody was told
	decides   bool            // the policy of flash is that of decideSoon, as somebody was told
	// damaged says that a device took data away that it had accepted:
	// requests may fail, and flushed writes be lost. hindered says that one
	// returned errors.
	damaged, hindered bool

	records uint64 // that were kept
	record  []byte // the newest, as a file has it; both are guarded by memoryMu

	memoryMu sync.Mutex
	memory   map[mirror.ID]uint64 // generations of mirrors that the host knows; guarded by memoryMu
}

// volume is what must be in one volume.
type volume struct {
	name   string
	id     block.VolumeID
	size   int64
	wanted int64                       // by the newest resize, which may have had no answer
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
// errors of devices while they last, and a disk that it lacked; nothing else.
func (pl *pool) refused(err error, lacked bool) {
	pl.refusal = err
	if lacked && errors.Is(err, block.ErrInvalid) && strings.Contains(err.Error(), "missing") {
		return // as it must be; of what joins or leaves nobody knows whether the pool has it
	}
	if pl.usurped && errors.Is(err, block.ErrStale) || pl.damaged && errors.Is(err, block.ErrCorrupt) || pl.hindered && errors.Is(err, errMedium) {
		return
	}
	pl.w.violate("the pool of %s does not open: %v", pl.identity, err)
}

// lacks tells whether a disk of the pool is missing that p has not opened.
func (pl *pool) lacks(p *proc) bool {
	return slices.ContainsFunc(pl.disks, func(d *disk) bool {
		return d.missing && !d.leaving && (d.holder == nil || d.holder.p != p)
	})
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
	if pl.lacks(p) {
		w.violate("%s has opened the pool of %s without one of its devices", p.name, t.identity)
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
	if t.pool.Epoch() <= pl.epoch && !pl.damaged { // a disk may have lost the superblock that it had accepted
		w.violate("%s has the pool of %s at epoch %d, although %d was in use", p.name, t.identity, t.pool.Epoch(), pl.epoch)
	}
	pl.epoch, pl.usurped = t.pool.Epoch(), false
	pl.point, _ = r.Committed()
	if id := r.Header().ID; id != pl.made {
		pl.made, pl.named = id, pl.epoch
	}
	pl.compareVolumes(t.pool)
}

// compareVolumes holds the list of volumes against what was commanded. Of
// commands under way either outcome is right, and of all when a disk has lost what it took.
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
			if known != nil && known.wanted == v.Size {
				known.size = v.Size // so that command came through
			}
		case pl.damaged:
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
		if !there[name] && !pl.unsure[name] && !pl.damaged {
			pl.w.violate("volume %s of %s is gone", name, pl.identity)
		}
	}
}

// unmap drops the oracle's view of a region.
func (pl *pool) unmap() {
	if pl.region != nil {
		if point, _ := pl.region.Committed(); point > pl.point {
			pl.named = pl.epoch
		}
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
	switch {
	case v.gone:
		return
	case rec.Kind == oplog.KindTag:
		pl.publishTag(v, rec)
		return
	case pl.rest > 0:
		pl.publishOfChange(v, rec)
		return
	}
	var asked []*request // several, if they ask for the same
	for _, s := range w.sessions() {
		if s.volume != v.name || s.numbered.on { // those have tags
			continue
		}
		for _, r := range s.flying {
			if pl.explains(v, r, rec) {
				asked = append(asked, r)
			}
		}
	}
	o := &origin{may: len(asked)}
	if pl.isMove(v, rec) {
		if o.may == 0 {
			pl.moves += int64(rec.Count)
		}
		o.may++
	}
	if o.may > 0 {
		for _, r := range asked {
			r.origins = append(r.origins, o)
		}
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

// isMove tells whether a record can be the cleaner's, or of a scan or a removal: it writes blocks that are
// not zero with exactly what they hold.
func (pl *pool) isMove(v *volume, rec *oplog.Record) bool {
	if pl.w.opt.Cleaner.Off && pl.w.opt.Run == 0 && !pl.empties || rec.Kind != oplog.KindWrite {
		return false
	}
	for i := range block.Logical(rec.Count) {
		now := v.current(rec.LBA + i)
		if bytes.Equal(now, zeroPage[:]) || !bytes.Equal(now, pl.log.Payload(rec.First+oplog.Extent(i), 1)) {
			return false
		}
	}
	return true
}

// origin is where a record may come from: of may requests, or a mover, each asked for just
// what it holds, and nothing tells which of them it was.
type origin struct{ may int }

// disown says that a request published nothing. It tells whether that is wrong: a record is
// left that nobody else can have published.
func (r *request) disown() bool {
	for _, o := range r.origins {
		if o.may--; o.may == 0 {
			return true
		}
	}
	return false
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
