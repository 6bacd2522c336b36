package guest

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// FindPools looks for pools on files and block devices, and on those in folders; if
// no path is given, on all block devices of the host and in dir, a pair's. Nothing
// is written, and a device is locked for no longer than it takes to see whether
// somebody has it.
func FindPools(paths []string, dir string) (control.Found, error) {
	var f finder
	if err := f.candidates(paths, dir); err != nil {
		return control.Found{}, err
	}
	for _, path := range f.paths {
		f.look(path)
	}
	f.assemble()
	boot, err := region.BootID()
	if err != nil {
		return control.Found{}, err
	}
	return control.Found{Pools: f.pools(boot), Notes: f.notes}, nil
}

// FoundVolumes returns the names of the volumes of a pool that was found and that
// nobody has open.
func FoundVolumes(p control.FoundPool) (names []string, err error) {
	var devs []hpdi.Device
	for _, d := range p.Devices {
		var dev hpdi.Device
		if len(d.Copies) > 1 { // of which only one may be there
			var m *mirror.Mirror
			m, err = openMirror(pathsOf(d), func(string, error) {})
			dev = m
		} else {
			dev, err = file.Open(d.Copies[0].Path, file.Options{ReadOnly: true})
		}
		if err != nil {
			closeAll(devs)
			return nil, err
		}
		devs = append(devs, dev)
	}
	v, err := pool.OpenView(pool.ViewOptions{Devices: devs})
	if err != nil {
		closeAll(devs)
		return nil, err
	}
	for _, vol := range v.Volumes() {
		names = append(names, vol.Name)
	}
	return names, v.Close()
}

// Locked tells whether a process on this host has a device open.
func Locked(path string) bool {
	d, err := file.Open(path, file.Options{ReadOnly: true, Lock: true})
	if err == nil {
		_ = d.Close() // it was only looked at
	}
	return errors.Is(err, hpdi.ErrLocked)
}

// pathsOf returns the paths of the copies that are there.
func pathsOf(d control.FoundDevice) (paths []string) {
	for _, c := range d.Copies {
		if c.Path != "" {
			paths = append(paths, c.Path)
		}
	}
	return paths
}

// finder looks at devices, then puts copies together, then pools.
type finder struct {
	paths   []string
	locked  map[string]bool // by path
	mirrors [][]string      // paths of copies that belong together
	ids     []mirror.ID     // of mirrors
	strays  []string        // copies that are of no use by themselves
	members []foundMember
	notes   []string
}

// foundMember is a device of some pool.
type foundMember struct {
	label pool.Label
	use   *pool.LastUse // of a pool's first device
	dev   control.FoundDevice
}

func (f *finder) note(format string, args ...any) {
	f.notes = append(f.notes, fmt.Sprintf(format, args...))
}

// candidates collects what is to be looked at, each device once, however many
// names it has.
func (f *finder) candidates(paths []string, dir string) error {
	type inode struct{ kind, dev, ino uint64 }
	seen := map[inode]bool{}
	f.locked = map[string]bool{}
	add := func(path string, named bool) error {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			if named {
				return fmt.Errorf("look for pools in %s: %w", path, err)
			}
			return nil // it has gone, or leads nowhere
		}
		id := inode{uint64(st.Mode & unix.S_IFMT), uint64(st.Dev), st.Ino}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFBLK:
			id = inode{kind: unix.S_IFBLK, dev: uint64(st.Rdev)}
		default:
			return nil
		}
		if !seen[id] {
			seen[id] = true
			f.paths = append(f.paths, path)
		}
		return nil
	}
	if len(paths) == 0 {
		disks, err := os.ReadDir("/sys/class/block")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("list the block devices: %w", err)
		}
		for _, d := range disks {
			// Slashes in a device's name are exclamation marks there.
			_ = add("/dev/"+strings.ReplaceAll(d.Name(), "!", "/"), false)
		}
		if _, err := os.Stat(dir); err == nil {
			paths = []string{dir}
		}
	}
	for _, path := range paths {
		entries, err := os.ReadDir(path)
		if errors.Is(err, unix.ENOTDIR) {
			err = add(path, true)
		}
		if err != nil {
			return fmt.Errorf("look for pools in %s: %w", path, err)
		}
		for _, e := range entries {
			_ = add(filepath.Join(path, e.Name()), false)
		}
	}
	return nil
}

// look finds out what a file is.
func (f *finder) look(path string) {
	ours, err := marked(path)
	if err != nil {
		f.note("%s cannot be looked at: %v", path, err)
	}
	if !ours {
		return
	}
	d, err := file.Open(path, file.Options{ReadOnly: true, Lock: true})
	if errors.Is(err, hpdi.ErrLocked) {
		f.locked[path] = true
		d, err = file.Open(path, file.Options{ReadOnly: true})
	}
	if err != nil {
		f.note("%s cannot be looked at: %v", path, err)
		return
	}
	devs, err := mirror.Assemble([]hpdi.Device{d}, mirror.Options{Degraded: true, ReadOnly: true})
	if err != nil {
		f.strays = append(f.strays, path) // Assemble has closed it
		return
	}
	defer closeAll(devs)
	if ms := mirrors(devs); len(ms) == 1 {
		f.group(path, ms[0].ID())
		return
	}
	f.member(devs[0], control.FoundDevice{Size: devs[0].Info().Size, Copies: []control.FoundCopy{{Path: path, InUse: f.locked[path]}}})
}

// marked tells whether a file begins as a device of a pool or a copy of a mirror
// does, at one of the places where they begin.
func marked(path string) (ours bool, err error) {
	d, err := file.Open(path, file.Options{ReadOnly: true, Direct: file.DirectOff, Engine: file.EngineSync})
	if errors.Is(err, file.ErrTooSmall) {
		return false, nil // loop devices without a file among others
	}
	if err != nil {
		return false, err
	}
	r, err := hpdi.NewBlocking(d, 1)
	if err != nil {
		return false, errors.Join(err, d.Close())
	}
	defer func() { err = errors.Join(err, r.Close(), d.Close()) }()
	first := make([]byte, block.Size)
	for _, at := range []int64{0, 128 * block.Size} {
		if at >= d.Info().Size {
			break
		}
		if _, err := r.ReadAt(first, at); err != nil {
			return false, err
		}
		if k := ondisk.Kind(first[:8]); k == ondisk.KindLabel || k == ondisk.KindMirror {
			return true, nil
		}
	}
	return false, nil
}

// group adds a copy to those of its mirror.
func (f *finder) group(path string, id mirror.ID) {
	if i := slices.Index(f.ids, id); i >= 0 {
		f.mirrors[i] = append(f.mirrors[i], path)
		return
	}
	f.ids, f.mirrors = append(f.ids, id), append(f.mirrors, []string{path})
}

// openMirror opens a mirror to look at it. All paths must be of one.
func openMirror(paths []string, without func(path string, why error)) (*mirror.Mirror, error) {
	var devs []hpdi.Device
	for _, path := range paths {
		d, err := file.Open(path, file.Options{ReadOnly: true})
		if err != nil {
			closeAll(devs)
			return nil, err
		}
		devs = append(devs, d)
	}
	o := mirror.Options{Degraded: true, ReadOnly: true}
	if without != nil {
		o.LeftOut = func(d hpdi.Device, why error) { without(d.Info().Name, why) }
	}
	devs, err := mirror.Assemble(devs, o)
	if err != nil {
		return nil, err
	}
	if ms := mirrors(devs); len(ms) == 1 && len(devs) == 1 {
		return ms[0], nil
	}
	closeAll(devs)
	return nil, errors.New("they are not of one mirror")
}

// assemble opens the mirrors that were found and reads what they say. A copy that
// lacks what others have is found to be of the same mirror only beside one of them.
func (f *finder) assemble() {
	for _, path := range f.strays {
		at := slices.IndexFunc(f.mirrors, func(g []string) bool {
			m, err := openMirror(append(slices.Clone(g), path), nil)
			if err != nil {
				return false
			}
			_ = m.Close() // it was only read
			return true
		})
		if at < 0 {
			f.note("%s is a copy of a mirror of which no copy that has everything was found, or is damaged", path)
			continue
		}
		f.mirrors[at] = append(f.mirrors[at], path)
	}
	for _, group := range f.mirrors {
		m, err := openMirror(group, func(path string, why error) { f.note("%s is left out: %v", path, why) })
		if err != nil {
			f.note("the mirror of %s cannot be looked at: %v", strings.Join(group, ", "), err)
			continue
		}
		d := control.FoundDevice{Size: m.Info().Size}
		for _, c := range m.Status().Copies {
			fc := control.FoundCopy{Path: c.Info.Name, State: c.State.String(), InUse: f.locked[c.Info.Name]}
			if fc.Path == "" {
				fc.State = mirror.Absent.String()
			}
			d.Copies = append(d.Copies, fc)
		}
		f.member(m, d)
		_ = m.Close() // it was only read
	}
}

// member reads what a device, or a mirror, says of its pool.
func (f *finder) member(dev hpdi.Device, d control.FoundDevice) {
	l, err := pool.ReadLabel(dev)
	if err != nil {
		f.note("%v", err)
		return
	}
	d.Number = l.Index + 1
	m := foundMember{label: l, dev: d}
	if l.Index == 0 {
		u, err := pool.ReadLastUse(dev, l.Pool)
		if err != nil {
			f.note("device %s of pool %s: %v", dev.Info().Name, l.Name, err)
			return
		}
		m.use = &u
	}
	f.members = append(f.members, m)
}

// pools puts the devices together. boot is that of this host.
func (f *finder) pools(boot string) []control.FoundPool {
	out := []control.FoundPool{}
	byID := map[block.PoolID][]foundMember{}
	var order []block.PoolID
	for _, m := range f.members {
		if byID[m.label.Pool] == nil {
			order = append(order, m.label.Pool)
		}
		byID[m.label.Pool] = append(byID[m.label.Pool], m)
	}
	for _, id := range order {
		out = append(out, foundPool(byID[id], boot))
	}
	slices.SortStableFunc(out, func(x, y control.FoundPool) int { return strings.Compare(x.Name, y.Name) })
	return out
}

// foundPool says of the devices of one pool what state it is in.
func foundPool(all []foundMember, boot string) control.FoundPool {
	// Of two first devices, one of which is an old copy, the newer one counts.
	slices.SortStableFunc(all, func(x, y foundMember) int {
		if d := x.label.Index - y.label.Index; d != 0 || x.use == nil {
			return d
		}
		return cmp.Compare(y.use.Epoch, x.use.Epoch)
	})
	first := all[0]
	p := control.FoundPool{Name: first.label.Name, ID: first.label.Pool.String(), Guest: first.label.Identity, Host: first.label.Host, Devices: []control.FoundDevice{}}
	if first.use == nil {
		p.State, p.Missing = control.FoundIncomplete, []int{1}
		for _, m := range all {
			p.Devices = append(p.Devices, m.dev)
		}
		return p
	}
	u := first.use
	p.Epoch, p.Boot, p.Region = uint64(u.Epoch), u.BootID, u.RegionID
	p.Here = u.RegionID != "" && u.BootID == boot
	exported, twice, inUse := u.RegionID == "", false, false
	have := map[int]foundMember{}
	for _, m := range all {
		i := m.label.Index
		names := strings.Join(pathsOf(m.dev), ", ")
		switch other, taken := have[i]; {
		case i >= len(u.Devices) && m.label.Joining:
			p.Notes = append(p.Notes, fmt.Sprintf("%s was about to be added, and is no part of it", names))
			continue
		case i >= len(u.Devices) || m.label.Device != u.Devices[i]:
			p.Notes = append(p.Notes, fmt.Sprintf("%s is no part of it any more, or an old copy", names))
			continue
		case taken:
			twice = true
			p.Notes = append(p.Notes, fmt.Sprintf("%s and %s both are device %d: name the devices that count", strings.Join(pathsOf(other.dev), ", "), names, i+1))
			continue
		}
		have[i] = m
		exported = exported && m.label.Exported
		for _, c := range m.dev.Copies {
			inUse = inUse || c.InUse
			if c.Path == "" {
				p.Notes = append(p.Notes, fmt.Sprintf("a copy of device %d is missing: the pool goes on without, and without what only that copy has", i+1))
			}
		}
		if m.label.Name != p.Name || m.label.Identity != p.Guest {
			p.Notes = append(p.Notes, fmt.Sprintf("%s calls it pool %s of %s: an import was interrupted", names, m.label.Name, m.label.Identity))
		}
	}
	for i, id := range u.Devices {
		if id == (block.DeviceID{}) {
			continue // it was removed
		}
		p.Wants++
		if m, ok := have[i]; ok {
			p.Devices = append(p.Devices, m.dev)
		} else {
			p.Missing = append(p.Missing, i+1)
		}
	}
	switch {
	case len(p.Missing) > 0 || twice:
		p.State = control.FoundIncomplete
	case inUse:
		p.State = control.FoundInUse
	case exported:
		p.State = control.FoundExported
	case u.RegionID != "":
		p.State = control.FoundNotClosed
	default:
		p.State = control.FoundNotExported
	}
	return p
}
