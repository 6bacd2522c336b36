// Package config holds the settings of a pair: their file, their defaults and
// what makes them valid.
//
// Settings come from DIR/config.yaml, or the file that the user names, over
// defaults that need no file at all. What the pair itself must remember from
// one run to the next (ports it chose, devices that were added by a command)
// is kept apart in DIR/state.json, which [Load] lays over the file. The agent
// writes the outcome to DIR/run/effective.json; guests read that and nothing
// else, so that all processes of a pair agree.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/goccy/go-yaml"
)

// Config are the settings of a pair.
type Config struct {
	// Dir is the directory of the pair, absolute.
	Dir string `yaml:"-" json:"dir"`
	// RegionDir is where the regions' memory is mounted. Default DIR/region.
	RegionDir string `yaml:"region_dir" json:"region_dir"`
	// Guests are one or two. Default: a and b.
	Guests []Guest `yaml:"guests" json:"guests"`
	// Memory is what a guest may take in all, with its partner's pool taken
	// over. 0: what log, cache and devices come to.
	Memory Size `yaml:"memory" json:"memory,omitempty"`
	// Log is the size of each pool's operation log in shared memory. Default
	// 256 MiB, or an eighth of Memory where that is less.
	Log Size `yaml:"log" json:"log"`
	// Cache is the size of each pool's cache of clean blocks. Default 256 MiB;
	// with Memory it is 0, which stands for what is left of that, divided among them.
	Cache Size `yaml:"cache" json:"cache"`
	// DedupIndex is the memory of each pool's index of fingerprints, which a guest takes
	// once a volume of the pool shares blocks. Default 32 MiB, or a 64th of Memory where
	// that is less.
	DedupIndex Size `yaml:"dedup_index" json:"dedup_index"`
	// Points are the limits of consistency points.
	Points Points `yaml:"consistency_points" json:"consistency_points"`
	// Failover are the rules by which one guest takes over another.
	Failover Failover `yaml:"failover" json:"failover"`
	// NBD are the settings of the NBD servers.
	NBD NBD `yaml:"nbd" json:"nbd"`
	// VhostUser are the settings of the sockets for virtual machines.
	VhostUser VhostUser `yaml:"vhost_user" json:"vhost_user"`
	// Rings are the settings of the sockets for rings in shared memory.
	Rings Rings `yaml:"rings" json:"rings"`
	// Cleaner makes whole free tracks of fragmented pools.
	Cleaner Cleaner `yaml:"cleaner" json:"cleaner"`
	// Scrub proves what pools hold in the background.
	Scrub Scrub `yaml:"scrub" json:"scrub"`
	// Resilver fills copies of mirrors.
	Resilver Resilver `yaml:"resilver" json:"resilver"`
	// Alerts says who is told of alerts.
	Alerts Alerts `yaml:"alerts" json:"alerts"`
	// Metrics is where monitoring finds the pair.
	Metrics Metrics `yaml:"metrics" json:"metrics"`
	// Exports are settings of single volumes, by their names.
	Exports map[string]Export `yaml:"exports" json:"exports,omitempty"`
	// LogFile is the size at which a process's log file is renamed to .1.
	LogFile Size `yaml:"log_file" json:"log_file"`
	// CrashReports bounds what is kept of guests that failed.
	CrashReports CrashReports `yaml:"crash_reports" json:"crash_reports"`
	// EventFile is the size at which the event log is renamed to .1.
	EventFile Size `yaml:"event_file" json:"event_file"`
}

// Guest are the settings of one guest and its identity.
type Guest struct {
	// Name is what commands call it: letters, digits and dashes.
	Name string `yaml:"name" json:"name"`
	// Address is the IP address of its identity.
	Address string `yaml:"address" json:"address"`
	// Port is the TCP port of its NBD server. 0 chooses a free one, once.
	Port *int `yaml:"port" json:"port"`
	// Socket is the unix socket of its NBD server. Default DIR/run/nbd-NAME.sock.
	Socket string `yaml:"socket" json:"socket"`
	// Policy says what comes first when the guest fails, as Failover.Policy, which
	// is its default.
	Policy string `yaml:"policy" json:"policy,omitempty"`
	// Pool is the guest's own pool.
	Pool Pool `yaml:"pool" json:"pool"`
}

// Pool are the settings of a pool.
type Pool struct {
	// Name of the pool. Default pool-NAME.
	Name string `yaml:"name" json:"name"`
	// Devices are block devices or files. Default DIR/pool-NAME.img, and
	// DIR/pool-NAME.copy2.img and so on where copies are kept.
	Devices []string `yaml:"devices" json:"devices"`
	// Copies is on how many devices each block is kept: the devices are taken
	// in groups of so many, in their order, each of which is a mirror. 1 keeps
	// one copy. It is decided when the pool is made.
	Copies int `yaml:"copies" json:"copies,omitempty"`
	// Removing are those of Devices whose removal was begun. They belong to the
	// pool only if it says so, and may be missing or hold nothing if not.
	Removing []string `yaml:"-" json:"removing,omitempty"`
	// Size is that of files which do not exist yet.
	Size Size `yaml:"size" json:"size"`
	// Manual leaves a pool that does not exist yet to `pollux pool create`.
	Manual bool `yaml:"manual" json:"manual"`
	// AcceptLoss opens the pool although its region is lost or damaged: what
	// was acknowledged and not flushed is given up.
	AcceptLoss bool `yaml:"accept_loss" json:"accept_loss,omitempty"`
	// BatteryBacked says that the host's memory survives a power cut, so
	// that a flush has nothing to do.
	BatteryBacked bool `yaml:"battery_backed" json:"battery_backed,omitempty"`
	// Create is set by the agent until the pool has been seen once: only then
	// may empty devices be made a pool.
	Create bool `yaml:"-" json:"create,omitempty"`
	// Import is set by the agent until a pool that comes from elsewhere has been
	// seen open: until then its labels may name another guest.
	Import *Import `yaml:"-" json:"import,omitempty"`
	// Widths are on how many devices each device of the pool keeps its blocks,
	// where that is not Copies for all of them.
	Widths []int `yaml:"-" json:"widths,omitempty"`
	// Adding is how many of the last Devices are being added, together as one
	// device of the pool: they belong to it only if their label says so.
	Adding int `yaml:"-" json:"adding,omitempty"`
}

// Import is a pool that is taken over from elsewhere.
type Import struct {
	// ID is the pool's identity: labels of other pools are left alone.
	ID string `yaml:"-" json:"id"`
	// Epoch is that in which it was found.
	Epoch uint64 `yaml:"-" json:"epoch"`
	// AcceptLoss opens it although its region is not here.
	AcceptLoss bool `yaml:"-" json:"accept_loss,omitempty"`
}

// NBD are settings of all exports.
type NBD struct {
	// TLS is "off", "allowed" or "required"; it concerns TCP and unix sockets
	// alike.
	TLS string `yaml:"tls" json:"tls"`
	// Cert, Key and CA are PEM files. With CA, clients must show a
	// certificate that it signed.
	Cert string `yaml:"cert" json:"cert,omitempty"`
	Key  string `yaml:"key" json:"key,omitempty"`
	CA   string `yaml:"ca" json:"ca,omitempty"`
	// Allow lists the addresses or prefixes that may connect over TCP; empty
	// means all. An export's own list replaces it.
	Allow []string `yaml:"allow" json:"allow,omitempty"`
	// MaxConnections is the limit of connections to one identity.
	MaxConnections int `yaml:"max_connections" json:"max_connections"`
}

// Export are settings of one volume's export.
type Export struct {
	ReadOnly bool     `yaml:"read_only" json:"read_only,omitempty"`
	Allow    []string `yaml:"allow" json:"allow,omitempty"`
}

// MaxGuests is the most guests of a pair.
const MaxGuests = 2

// MaxCopies is the most devices that keep the same blocks.
const MaxCopies = 3

// Default ports, addresses and sizes.
const (
	DefaultPort     = 10809
	DefaultPoolSize = Size(64 << 30)
	minPoolSize     = Size(64 << 20)
	minLog          = Size(8 << 20)
	minDedupIndex   = Size(64 << 10)
	maxSocketPath   = 107 // sun_path without its final zero
)

// Load returns the settings of the pair in dir: defaults, then file (or
// DIR/config.yaml where that exists and file is empty), then what the pair
// remembers. The result is valid.
func Load(dir, file string) (*Config, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", dir, err)
	}
	c := &Config{}
	name := file
	if name == "" {
		name = filepath.Join(abs, "config.yaml")
	}
	p, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && file == "":
	case err != nil:
		return nil, fmt.Errorf("read settings: %w", err)
	default:
		if c, err = Parse(p); err != nil {
			return nil, fmt.Errorf("settings in %s: %w", name, err)
		}
	}
	c.Dir = abs
	c.setDefaults()
	st, err := ReadState(abs)
	if err != nil {
		return nil, err
	}
	st.apply(c)
	return c, c.Validate()
}

// Parse reads the text of a settings file. Unknown settings are errors.
func Parse(p []byte) (*Config, error) {
	c := &Config{}
	if len(p) == 0 {
		return c, nil
	}
	if err := yaml.UnmarshalWithOptions(p, c, yaml.Strict()); err != nil {
		return nil, err
	}
	return c, nil
}

func or[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// setDefaults fills in what the file left out.
func (c *Config) setDefaults() {
	if c.RegionDir == "" {
		c.RegionDir = filepath.Join(c.Dir, "region")
	} else if !filepath.IsAbs(c.RegionDir) {
		c.RegionDir = filepath.Join(c.Dir, c.RegionDir)
	}
	if len(c.Guests) == 0 {
		c.Guests = []Guest{{Name: "a"}, {Name: "b"}}
	}
	or(&c.Log, DefaultLog(c.Memory))
	if c.Memory == 0 {
		or(&c.Cache, 256<<20)
	}
	or(&c.DedupIndex, DefaultDedupIndex(c.Memory))
	c.setPartDefaults()
	or(&c.LogFile, 16<<20)
	or(&c.EventFile, 4<<20)
	c.Failover.setDefaults()
	or(&c.NBD.TLS, "off")
	or(&c.NBD.MaxConnections, 1024)
	for i := range c.Guests {
		c.Guests[i].setDefaults(c.Dir, i)
		or(&c.Guests[i].Policy, c.Failover.Policy)
	}
}

// DefaultLog is the size of logs that the settings leave open: 256 MiB, or an
// eighth of the memory that is set where that is less.
func DefaultLog(memory Size) Size {
	if memory == 0 {
		return 256 << 20
	}
	return max(minLog, min(256<<20, memory/8&^(1<<20-1)))
}

// DefaultDedupIndex is the size of indexes of fingerprints that the settings leave open:
// 32 MiB, or a 64th of the memory that is set where that is less.
func DefaultDedupIndex(memory Size) Size {
	if memory == 0 {
		return 32 << 20
	}
	return max(minDedupIndex, min(32<<20, memory/64))
}

func (g *Guest) setDefaults(dir string, i int) {
	or(&g.Address, fmt.Sprintf("127.0.0.%d", 11+i))
	if g.Port == nil {
		p := DefaultPort
		g.Port = &p
	}
	or(&g.Socket, filepath.Join(dir, "run", "nbd-"+g.Name+".sock"))
	or(&g.Pool.Name, "pool-"+g.Name)
	or(&g.Pool.Copies, 1)
	if len(g.Pool.Devices) == 0 && !g.Pool.Manual {
		g.Pool.Devices = defaultDevices(filepath.Join(dir, "pool-"+g.Name), g.Pool.Copies)
	}
	or(&g.Pool.Size, DefaultPoolSize)
	for i, d := range g.Pool.Devices {
		if !filepath.IsAbs(d) {
			g.Pool.Devices[i] = filepath.Join(dir, d)
		}
	}
	if !filepath.IsAbs(g.Socket) {
		g.Socket = filepath.Join(dir, g.Socket)
	}
}

// defaultDevices are the files of a pool that none were named for.
func defaultDevices(base string, copies int) []string {
	devs := []string{base + ".img"}
	for i := 2; i <= min(copies, MaxCopies); i++ {
		devs = append(devs, fmt.Sprintf("%s.copy%d.img", base, i))
	}
	return devs
}

// Guest returns the settings of the named guest, or nil.
func (c *Config) Guest(name string) *Guest {
	for i := range c.Guests {
		if c.Guests[i].Name == name {
			return &c.Guests[i]
		}
	}
	return nil
}

// Partner returns the name of the other guest, or "" when there is none.
func (c *Config) Partner(name string) string {
	for _, g := range c.Guests {
		if g.Name != name {
			return g.Name
		}
	}
	return ""
}

// RunDir is where sockets and the state of this run are.
func (c *Config) RunDir() string { return filepath.Join(c.Dir, "run") }

// LogDir is where the processes' logs are.
func (c *Config) LogDir() string { return filepath.Join(c.Dir, "log") }

// CrashDir is where reports of guests that failed are kept.
func (c *Config) CrashDir() string { return filepath.Join(c.Dir, "crash") }

// LastWordsPath is the file in the directory of a run for what a guest's process writes as
// it dies. With incarnation 0 it is what all those of a guest begin with.
func LastWordsPath(runDir, guest string, inc uint64) string {
	begin := filepath.Join(runDir, "guest-"+guest+".died-")
	if inc == 0 {
		return begin
	}
	return begin + strconv.FormatUint(inc, 10)
}

// RegionPath is the region file of an identity's pool.
func (c *Config) RegionPath(identity string) string {
	return filepath.Join(c.RegionDir, "pool-"+identity)
}

// Endpoint is the TCP address of the guest's identity.
func (g *Guest) Endpoint() string { return net.JoinHostPort(g.Address, strconv.Itoa(*g.Port)) }

// setPartDefaults fills in what is missing of the settings that are parts of their
// own.
func (c *Config) setPartDefaults() {
	c.Points.setDefaults(c.Memory)
	c.Cleaner.setDefaults()
	c.Scrub.setDefaults()
	c.Resilver.setDefaults()
	c.Alerts.setDefaults()
	c.CrashReports.setDefaults()
	c.VhostUser.setDefaults(c.Dir)
	c.Rings.setDefaults(c.Dir)
}

// Validate says what is wrong with the settings, naming the setting.
func (c *Config) Validate() error {
	if n := len(c.Guests); n < 1 || n > MaxGuests {
		return fmt.Errorf("guests: there are %d; a pair has two, and one alone works unprotected", n)
	}
	if c.Log < minLog {
		return fmt.Errorf("log: %s is too small, at least %s", c.Log, minLog)
	}
	if c.Cache < 1<<20 && (c.Memory == 0 || c.Cache != 0) {
		return fmt.Errorf("cache: %s is too small, at least 1MiB", c.Cache)
	}
	if c.DedupIndex < minDedupIndex {
		return fmt.Errorf("dedup_index: %s is too small, at least %s", c.DedupIndex, minDedupIndex)
	}
	if err := errors.Join(c.Points.validate(c.Log), c.Failover.validate()); err != nil {
		return err
	}
	if err := errors.Join(c.NBD.validate(), c.VhostUser.validate(), c.Rings.validate()); err != nil {
		return err
	}
	if err := errors.Join(c.Cleaner.validate(), c.Scrub.validate(), c.Resilver.validate(), c.Alerts.validate(), c.Metrics.validate(), c.CrashReports.validate()); err != nil {
		return err
	}
	for name, e := range c.Exports {
		if err := validateAllow(fmt.Sprintf("exports.%s.allow", name), e.Allow); err != nil {
			return err
		}
	}
	seen := map[string]string{}
	once := func(what, value, setting string) error {
		if prev, dup := seen[what+value]; dup {
			return fmt.Errorf("%s: %s %s is that of %s already", setting, what, value, prev)
		}
		seen[what+value] = setting
		return nil
	}
	for i := range c.Guests {
		g := &c.Guests[i]
		if err := g.validate(i); err != nil {
			return err
		}
		at := func(s string) string { return fmt.Sprintf("guests[%d].%s", i, s) }
		errs := []error{once("name", g.Name, at("name")), once("socket", g.Socket, at("socket"))}
		if g.Pool.Exists() {
			errs = append(errs, once("pool name", g.Pool.Name, at("pool.name")))
		}
		if *g.Port != 0 {
			errs = append(errs, once("address", g.Endpoint(), at("address")))
		}
		for _, d := range g.Pool.Devices {
			errs = append(errs, once("device", d, at("pool.devices")))
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
		for _, s := range []string{g.Socket, filepath.Join(c.RunDir(), "guest-"+g.Name+".link")} {
			if len(s) > maxSocketPath {
				return fmt.Errorf("socket path %s has %d bytes, and the system allows %d: choose a shorter --dir", s, len(s), maxSocketPath)
			}
		}
	}
	return nil
}

func (g *Guest) validate(i int) error {
	at := func(s string) string { return fmt.Sprintf("guests[%d].%s", i, s) }
	if !validName(g.Name) {
		return fmt.Errorf("%s: %q is not a name of 1 to 16 lower-case letters, digits and dashes", at("name"), g.Name)
	}
	if _, err := netip.ParseAddr(g.Address); err != nil {
		return fmt.Errorf("%s: %q is not an IP address", at("address"), g.Address)
	}
	if *g.Port < 0 || *g.Port > 65535 {
		return fmt.Errorf("%s: %d is not a port", at("port"), *g.Port)
	}
	if n := g.Pool.Copies; n < 1 || n > MaxCopies {
		return fmt.Errorf("%s: %d, from 1 to %d are possible", at("pool.copies"), n, MaxCopies)
	}
	if err := g.Pool.validateGroups(); err != nil {
		return fmt.Errorf("%s: %w", at("pool.devices"), err)
	}
	if err := validatePolicy(at("policy"), g.Policy); err != nil {
		return err
	}
	if g.Pool.Size < minPoolSize {
		return fmt.Errorf("%s: %s is too small, at least %s", at("pool.size"), g.Pool.Size, minPoolSize)
	}
	return nil
}

func validName(s string) bool {
	if len(s) == 0 || len(s) > 16 || s[0] == '-' {
		return false
	}
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return true
}

func (n *NBD) validate() error {
	switch n.TLS {
	case "off":
	case "allowed", "required":
		if n.Cert == "" || n.Key == "" {
			return fmt.Errorf("nbd.tls: %q needs nbd.cert and nbd.key", n.TLS)
		}
	default:
		return fmt.Errorf("nbd.tls: %q is none of off, allowed, required", n.TLS)
	}
	if n.MaxConnections < 1 {
		return fmt.Errorf("nbd.max_connections: %d, at least 1", n.MaxConnections)
	}
	return validateAllow("nbd.allow", n.Allow)
}

func validateAllow(setting string, list []string) error {
	for _, s := range list {
		if _, err := ParsePrefix(s); err != nil {
			return fmt.Errorf("%s: %q is neither an address nor a prefix such as 10.0.0.0/8", setting, s)
		}
	}
	return nil
}

// ParsePrefix reads an address or a prefix of an allow-list.
func ParsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	return netip.ParsePrefix(s)
}
