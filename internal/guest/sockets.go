package guest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/identity"
)

// protocol is what sockets of one kind have of their own.
type protocol struct {
	scheme    string // of their URIs
	network   string // "unix" or "unixpacket"
	who       string // attaches there, in words
	off       bool   // no sockets
	dir       string // of them
	ending    string
	path      func(identity, volume string) (string, error)
	newServer func(block.Volume, *socket) (server, error)
}

// server serves one volume at a socket.
type server interface {
	Serve(*net.UnixListener) error // nil after Shutdown
	Resized()
	Shutdown(context.Context)
	Stats() (clients int, counts control.SocketCounts)
}

// sockets are those of one kind at which clients on the same host attach to the volumes of
// a tenancy.
//
// Whoever serves an identity binds them itself, in place of those of whoever served it
// before. They are not held open by the agent, as the sockets of NBD are: a virtual machine
// that connects to a socket at which nobody accepts yet stands still until somebody answers,
// for QEMU talks with the back-end in its main loop. One that is refused runs on and tries
// again. So do programs with rings.
type sockets struct {
	protocol
	cfg      *config.Config
	identity string
	log      *slog.Logger
	wg       sync.WaitGroup // of the servers' loops

	closed atomic.Bool // nothing more is opened; set without the lock, which is held while that goes on

	mu   sync.Mutex // guards what follows; held while sockets are changed, for one change at a time
	open map[block.VolumeID]*socket
}

// socket is that of one volume. Of what it holds only the name changes.
type socket struct {
	name     string
	path     string // "" after it could not be renamed
	serial   string // of the disk that a virtual machine sees
	readOnly bool
	server   server
	ln       *net.UnixListener
	why      string // why there is no path; server and ln are nil if there never was one
}

func newSockets(cfg *config.Config, identity string, log *slog.Logger, p protocol) *sockets {
	return &sockets{protocol: p, cfg: cfg, identity: identity, log: log, open: map[block.VolumeID]*socket{}}
}

// begin opens the sockets in the background: a pool may have thousands of volumes, and
// whoever calls has other clients to serve. Who asks for the status waits until that
// is done.
func (h *sockets) begin(st Store, wg *sync.WaitGroup) {
	h.mu.Lock()
	wg.Go(func() {
		defer h.mu.Unlock()
		h.syncLocked(st)
	})
}

// sync brings the sockets in line with the volumes of a store.
func (h *sockets) sync(st Store) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.syncLocked(st)
}

// syncLocked is sync; without a store there are no volumes.
// What cannot be had is told in the status, and tried again at the next change: the
// volume is served by NBD all the same.
func (h *sockets) syncLocked(st Store) {
	if h.closed.Load() || h.off {
		return
	}
	err := os.MkdirAll(h.dir, 0o755) // who may connect is said by the sockets, and by DIR
	if err != nil {
		h.log.Warn("no sockets for "+h.who, "identity", h.identity, "error", err)
	}
	var volumes []VolumeInfo
	if st != nil {
		volumes = st.Volumes()
	}
	have := map[block.VolumeID]VolumeInfo{}
	for _, v := range volumes {
		have[v.ID] = v
	}
	// First what goes, so that its name is free.
	var ends sync.WaitGroup
	for id, x := range h.open {
		if v, ok := have[id]; !ok || x.server == nil || x.path == "" && x.name != v.Name || x.readOnly != h.cfg.Exports[v.Name].ReadOnly {
			h.dropLocked(id, &ends)
		}
	}
	ends.Wait()
	h.renameLocked(volumes)
	for _, v := range volumes {
		if h.open[v.ID] != nil || h.closed.Load() {
			continue
		}
		x := h.offer(st, v, err)
		h.open[v.ID] = x
		if x.why != "" && err == nil {
			h.log.Warn("no socket for "+h.who, "volume", v.Name, "error", x.why)
		}
	}
	h.tidyLocked()
}

// offer opens the socket of a volume and serves it.
func (h *sockets) offer(st Store, v VolumeInfo, err error) *socket {
	x := &socket{name: v.Name, readOnly: h.cfg.Exports[v.Name].ReadOnly}
	// It stays the same when the volume is renamed or its pool is moved, and is as long
	// as a virtio disk's may be.
	x.serial = fmt.Sprintf("%.8s-%d", st.Region().Pool, v.ID)
	if err == nil {
		err = h.serve(st, v.ID, x)
	}
	if err != nil {
		x.why = err.Error()
	}
	return x
}

func (h *sockets) serve(st Store, id block.VolumeID, x *socket) error {
	path, err := h.path(h.identity, x.name)
	if err != nil {
		return err
	}
	v, err := st.Volume(x.name)
	if err != nil {
		return err
	}
	if v.Info().ID != id {
		// Whoever has renamed them looks at both again.
		return fmt.Errorf("another volume has the name %s by now", x.name)
	}
	srv, err := h.newServer(v, x)
	if err != nil {
		return err
	}
	ln, err := identity.ReplaceUnix(h.network, path, 0o660)
	if err != nil {
		return err
	}
	x.path, x.server, x.ln = path, srv, ln
	h.wg.Go(func() {
		if err := srv.Serve(ln); err != nil {
			h.log.Error("a socket takes no more "+h.who, "volume", x.name, "error", err)
		}
	})
	return nil
}

// moving is added to the path of a socket while it has neither the old nor the new name.
const moving = "~moving"

// renameLocked gives sockets the new names of their volumes. Clients that are attached stay
// so. All lose the old name before one gets a new one: another's old name may be its new one.
func (h *sockets) renameLocked(volumes []VolumeInfo) {
	var renamed []VolumeInfo
	for _, v := range volumes {
		x := h.open[v.ID]
		if x == nil || x.name == v.Name {
			continue
		}
		if err := os.Rename(x.path, x.path+moving); err != nil {
			h.loseLocked(x, v.Name, err)
			continue
		}
		renamed = append(renamed, v)
	}
	for _, v := range renamed {
		x := h.open[v.ID]
		path, err := h.path(h.identity, v.Name)
		if err == nil {
			err = identity.RenameUnix(x.path+moving, path)
		}
		if err != nil {
			_ = os.Remove(x.path + moving)
			h.loseLocked(x, v.Name, err)
			continue
		}
		x.name, x.path = v.Name, path
	}
}

// loseLocked leaves a socket without a path. Who is attached stays so until somebody else
// serves.
func (h *sockets) loseLocked(x *socket, name string, err error) {
	x.name, x.path, x.why = name, "", err.Error()
	h.log.Warn("no socket for "+h.who, "volume", name, "error", err)
}

// dropLocked ends the socket of a volume that is no more, which ends waits for.
func (h *sockets) dropLocked(id block.VolumeID, ends *sync.WaitGroup) {
	x := h.open[id]
	delete(h.open, id)
	if x.server == nil {
		return
	}
	if x.path != "" {
		_ = os.Remove(x.path)
	}
	ends.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), grace)
		defer cancel()
		x.end(ctx)
	})
}

// end cuts clients, after the requests that are under way if these end in time.
func (x *socket) end(ctx context.Context) {
	x.server.Shutdown(ctx) // whoever was cut comes again
	_ = x.ln.Close()
}

// tidyLocked removes sockets of volumes that are no more: of those deleted or renamed
// just before whoever served them died.
func (h *sockets) tidyLocked() {
	known := map[string]bool{}
	for _, x := range h.open {
		known[x.path] = true
	}
	names, _ := filepath.Glob(filepath.Join(h.dir, "*"+h.ending))
	half, _ := filepath.Glob(filepath.Join(h.dir, "*"+h.ending+moving))
	for _, n := range append(names, half...) {
		if st, err := os.Lstat(n); err == nil && st.Mode()&os.ModeSocket != 0 && !known[n] {
			_ = os.Remove(n)
		}
	}
}

// resized tells the clients that a volume has another size.
func (h *sockets) resized(volume string) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.open {
		if x.name == volume && x.server != nil {
			x.server.Resized()
		}
	}
}

// close ends all of it, with ctx bounding the wait for requests under way. The sockets
// stay in the file system, for whoever serves next to replace: until then whoever
// connects is refused, and tries again.
func (h *sockets) close(ctx context.Context) {
	h.closed.Store(true)
	h.mu.Lock()
	defer h.mu.Unlock()
	var wg sync.WaitGroup
	for _, x := range h.open {
		if x.server != nil {
			wg.Go(func() { x.end(ctx) })
		}
	}
	wg.Wait()
	h.wg.Wait()
}

// status describes the socket of a volume, nil if there shall be none.
func (h *sockets) status(v VolumeInfo) (*control.VolumeSocket, *socket) {
	if h == nil {
		return nil, nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	x := h.open[v.ID]
	if x == nil {
		return nil, nil
	}
	s := &control.VolumeSocket{Socket: x.path, Note: x.why}
	if x.path != "" {
		s.URI = h.scheme + ":" + escapeSocket(x.path)
	}
	if x.server != nil {
		s.Clients, s.SocketCounts = x.server.Stats()
	}
	return s, x
}

// clients returns how many are attached to a volume.
func (h *sockets) clients(volume string) int {
	if h == nil {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.open {
		if x.name == volume && x.server != nil {
			n, _ := x.server.Stats()
			return n
		}
	}
	return 0
}
