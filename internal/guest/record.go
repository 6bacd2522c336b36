package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// recordEvent is the kind of events about restart records.
const recordEvent = "restart-record"

// program is the executable of this process as the host knows it, which the partner has in
// common with this guest, and a newer one has not. Empty if nothing tells: then no record
// counts.
var program = sync.OnceValue(func() string {
	var st unix.Stat_t
	if unix.Stat("/proc/self/exe", &st) != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d:%d:%d", st.Dev, st.Ino, st.Size, st.Mtim.Nano())
})

// recordSettings are the settings that a pool is opened and served by, as JSON. What only
// says how far a change of them is left out: the agent forgets it at some time.
func recordSettings(cfg *config.Config, set *config.Guest) string {
	pair, own := *cfg, *set
	pair.Guests, pair.Dir = nil, ""
	own.Pool.Create, own.Pool.Import, own.Pool.Adding, own.Pool.Removing = false, nil, 0, nil
	all := map[string]json.RawMessage{}
	for prefix, v := range map[string]any{"": pair, "guest.": own} {
		b, err := json.Marshal(v)
		var fields map[string]json.RawMessage
		if err == nil {
			err = json.Unmarshal(b, &fields)
		}
		if err != nil {
			return "" // it was read from JSON, so this is not reached
		}
		for name, text := range fields {
			all[prefix+name] = text
		}
	}
	b, _ := json.Marshal(all)
	return string(b)
}

// changing is why a pool is opened without a record, whatever that has, which nobody wonders
// at.
type changing string

func (c changing) Error() string { return string(c) }

// errNew is why a pool that was just made or imported is opened without a record.
const errNew = changing("the pool is new here")

// change says what changes a pool, nil if nothing does.
func change(set *config.Pool) error {
	switch {
	case set.Create || set.Import != nil:
		return errNew
	case set.Adding > 0:
		return changing("a device is being added")
	case len(set.Removing) > 0:
		return changing("a device is being removed")
	case set.AcceptLoss:
		return changing("loss is accepted")
	}
	return nil
}

// readRecord returns the record of an identity's pool that counts, or why there is none: that in
// the region, which is stored first, or else that in the pair's directory.
func readRecord(cfg *config.Config, identity string) (*restart.Record, error) {
	r, err := pool.ReadRecord(cfg.RegionPath(identity))
	if err == nil {
		return r, nil
	}
	if errors.Is(err, os.ErrNotExist) {
		err = restart.ErrNone
	}
	f, errF := restart.Read(restart.Path(cfg.Dir, identity))
	return restart.Newer(r, err, f, errF)
}

// usableRecord returns the record of an identity's pool if it may be true as far as can be told
// without opening a device, or why not.
func usableRecord(cfg *config.Config, set *config.Guest) (*restart.Record, error) {
	if err := change(&set.Pool); err != nil {
		return nil, err
	}
	r, err := readRecord(cfg, set.Name)
	if err != nil {
		return nil, err
	}
	boot, err := region.BootID()
	if err != nil {
		return nil, err
	}
	n := restart.Now{Program: program(), BootID: boot, Identity: set.Name, Settings: recordSettings(cfg, set), Paths: set.Pool.Devices}
	why := r.Differs(n)
	if why == "" && n.Program == "" {
		why = "nobody knows which program wrote the record"
	}
	if why != "" {
		return nil, errors.New(why)
	}
	return r, nil
}

// needsByRecord is needsOf by a record.
func needsByRecord(r *restart.Record) (poolNeeds, bool) {
	l, err := pool.FirstLabel(r)
	if err != nil {
		return poolNeeds{}, false
	}
	n := poolNeeds{log: l.LogBytes}
	for _, d := range r.Devices {
		least := d.Copies[0].File.Size
		for _, c := range d.Copies {
			least = min(least, c.File.Size)
		}
		n.blocks = append(n.blocks, uint64(least)/file.BlockSize)
	}
	n.follow(pool.UseIn(r))
	return n, true
}

// knownOf returns what the files of a record can do.
func knownOf(r *restart.Record) map[string]*file.Known {
	known := map[string]*file.Known{}
	if r == nil {
		return known
	}
	for path, f := range r.Files() {
		known[path] = &file.Known{
			Identity: file.Identity{Block: f.Block, Device: f.Device, Inode: f.Inode, Born: f.Born, Size: f.Size},
			Info: hpdi.Info{Name: path, Driver: f.Driver, Size: f.Size, BlockSize: f.BlockSize, Direct: f.Direct,
				Discard: f.Discard, Zeroes: f.Zeroes, Durable: f.Durable, Rotates: f.Rotates, Note: f.Note},
		}
	}
	return known
}

// fileOf is what a record has of a file.
func fileOf(k file.Known) restart.File {
	i := k.Info
	return restart.File{
		Block: k.Identity.Block, Device: k.Identity.Device, Inode: k.Identity.Inode, Born: k.Identity.Born, Size: k.Identity.Size,
		Driver: i.Driver, BlockSize: i.BlockSize, Direct: i.Direct, Discard: i.Discard, Zeroes: i.Zeroes, Durable: i.Durable, Rotates: i.Rotates, Note: i.Note,
	}
}

// replaced says what of a record's devices is not as it was, now that they are open.
func (g *Guest) replaced(r *restart.Record) string {
	now := map[string]restart.File{}
	for path := range r.Files() {
		if k, ok := g.under.known(path); ok {
			now[path] = fileOf(k)
		}
	}
	return r.Replaced(now)
}

// recordTimes are when records are written: the first one a while after the pool serves, for
// those who waited for that come first.
const (
	recordFirst = 200 * time.Millisecond
	recordEvery = time.Second
)

// keepRecord writes a record of a tenancy's pool soon after it was opened, and whenever what it
// has changes, until the pool is given up.
func (g *Guest) keepRecord(t *tenancy, known *restart.Record) {
	log := g.log.With("identity", t.identity)
	var said string // the newest trouble, which is told once
	wait := time.NewTimer(recordFirst)
	defer wait.Stop()
	newest := known // that there is, whether or not it counts
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-wait.C:
		}
		if newest == nil {
			if r, err := readRecord(g.cfg, t.identity); err == nil {
				newest = r
			} else {
				newest = &restart.Record{}
			}
		}
		r, err := g.newRecord(t)
		if err == nil && !r.Same(known) {
			r.Number, r.Written = newest.Number+1, time.Now().UTC()
			newest = r
			if err = g.writeRecord(t, r); err == nil {
				known = r
			}
		}
		switch {
		case t.ctx.Err() != nil:
			return
		case err == nil:
			said = ""
		case err.Error() != said:
			said = err.Error()
			log.Warn("the restart record is not what it should be: the next start may take longer", "error", err)
		}
		wait.Reset(recordEvery)
	}
}

// writeRecord stores a record where guests look for it. A region without room for it keeps none.
func (g *Guest) writeRecord(t *tenancy, r *restart.Record) error {
	enc, err := r.Encode()
	if err != nil {
		return err
	}
	inRegion := t.store.KeepRecord(enc)
	return errors.Join(inRegion, restart.Write(restart.Path(g.cfg.Dir, t.identity), enc))
}

// newRecord returns what is so now.
func (g *Guest) newRecord(t *tenancy) (*restart.Record, error) {
	r, err := t.store.Restart(t.ctx)
	if err != nil {
		return nil, err
	}
	cfg, err := config.ReadEffective(g.cfg.Dir) // devices may have come and gone
	if err != nil {
		return nil, err
	}
	set := cfg.Guest(t.identity)
	if set == nil {
		return nil, fmt.Errorf("there are no settings for %s", t.identity)
	}
	r.Program, r.Settings = program(), recordSettings(cfg, set)
	if r.BootID, err = region.BootID(); err != nil {
		return nil, err
	}
	devs := map[string]hpdi.Device{}
	for _, d := range t.disks() {
		devs[d.Info().Name] = d
	}
	for i := range r.Devices {
		d := &r.Devices[i]
		dev := devs[d.Copies[0].Path]
		if dev == nil {
			return nil, fmt.Errorf("device %s is not open", d.Copies[0].Path) // it has just left
		}
		d.Copies = nil
		for _, path := range pathsOn(dev) {
			k, ok := g.under.known(path)
			if !ok {
				return nil, fmt.Errorf("device %s: nothing tells whether it is the same the next time", path)
			}
			d.Copies = append(d.Copies, restart.Copy{Path: path, File: fileOf(k)})
		}
	}
	for i := range r.Volumes {
		r.Volumes[i].ReadOnly = cfg.Exports[r.Volumes[i].Name].ReadOnly
	}
	return r, nil
}

// forgetRecord removes a record that turned out not to be true, or whose pool has left.
func (g *Guest) forgetRecord(identity string) {
	if err := restart.Remove(restart.Path(g.cfg.Dir, identity)); err != nil {
		g.log.Warn("a restart record stays", "identity", identity, "error", err)
	}
}

// tellOpened says how a pool was opened.
func (g *Guest) tellOpened(t *tenancy, tell func(kind, text string)) {
	how := t.store.Opened()
	if how.Why == "" {
		g.log.Info("the pool was opened by its restart record", "identity", t.identity, "record", how.Number)
		return
	}
	g.log.Info("the pool was opened without a restart record", "identity", t.identity, "reason", how.Why)
	if !how.Quiet {
		tell(recordEvent, fmt.Sprintf("pool %s was opened without a restart record, by looking at all devices: %s", t.store.Name(), how.Why))
	}
}

// restartStatus is how a pool was opened.
func restartStatus(o Opened) control.RestartStatus {
	return control.RestartStatus{Record: o.Why == "", Number: o.Number, Why: o.Why}
}

// withoutRecord is why a pool is opened without one.
func withoutRecord(why error) Opened {
	return Opened{Why: why.Error(), Quiet: errors.As(why, new(changing))}
}
