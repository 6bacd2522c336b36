package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

// AgentSocket returns the agent's control socket of a directory.
func AgentSocket(dir string) string { return filepath.Join(dir, "run", "agent.sock") }

// GuestSocket returns the control socket of a guest.
func GuestSocket(dir, guest string) string {
	return filepath.Join(dir, "run", "guest-"+guest+".sock")
}

// Client manages the pair of one directory. Its methods may be called
// concurrently; each returns errors that [KindOf] understands.
type Client struct {
	dir   string
	agent *conn
}

// NewClient returns a client for the pair that runs in dir. It connects when
// it is first used.
func NewClient(dir string) *Client {
	return &Client{dir: dir, agent: dial(AgentSocket(dir))}
}

// NewSocketClient returns a client for one socket, without a fallback.
func NewSocketClient(socket string) *Client {
	return &Client{agent: dial(socket)}
}

// Close drops idle connections.
func (c *Client) Close() { c.agent.http.CloseIdleConnections() }

// Status returns the state of the pair. With the agent gone it asks the
// guests themselves and says so in Alerts.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	err := c.agent.call(ctx, http.MethodGet, "/v1/status", nil, &st)
	if !c.fallback(err) {
		return st, err
	}
	parts, gerr := askGuests[Status](ctx, c, http.MethodGet, "/v1/status")
	if gerr != nil {
		return st, errNothingRuns(c.dir)
	}
	st = Status{Agent: AgentStatus{Dir: c.dir, Socket: AgentSocket(c.dir)}}
	st.Alerts = append(st.Alerts, "the agent is not running: guests serve on, and there is no automatic takeover; start it with `pollux up`")
	for _, p := range parts {
		st.Guests = append(st.Guests, p.Guests...)
		st.Alerts = append(st.Alerts, p.Alerts...)
		st.Notes = append(st.Notes, p.Notes...)
		if t := p.LastTakeover; t != nil && (st.LastTakeover == nil || t.Started.After(st.LastTakeover.Started)) {
			st.LastTakeover = t
		}
	}
	for i := range st.Guests {
		st.Guests[i].Protected = false
		st.Guests[i].Why = "the agent is not running"
	}
	st.Notes = append(st.Notes, "as told by the guests themselves")
	return st, nil
}

// Volumes lists all volumes, of both identities.
func (c *Client) Volumes(ctx context.Context) ([]Volume, error) {
	var v []Volume
	err := c.agent.call(ctx, http.MethodGet, "/v1/volumes", nil, &v)
	if !c.fallback(err) {
		return v, err
	}
	parts, gerr := askGuests[[]Volume](ctx, c, http.MethodGet, "/v1/volumes")
	if gerr != nil {
		return nil, errNothingRuns(c.dir)
	}
	for _, p := range parts {
		v = append(v, p...)
	}
	return v, nil
}

// Volume describes one volume.
func (c *Client) Volume(ctx context.Context, name string) (Volume, error) {
	var v Volume
	err := c.agent.call(ctx, http.MethodGet, "/v1/volumes/"+url.PathEscape(name), nil, &v)
	if !c.fallback(err) {
		return v, err
	}
	all, err := c.Volumes(ctx)
	if err != nil {
		return v, err
	}
	for _, w := range all {
		if w.Name == name {
			return w, nil
		}
	}
	return v, NewError(KindNotFound, fmt.Sprintf("volume %q is not served by a living guest", name), "the agent is not running: start it with `pollux up`")
}

// CreateVolume makes a thin volume.
func (c *Client) CreateVolume(ctx context.Context, req VolumeCreate) (Volume, error) {
	var v Volume
	err := c.agent.call(ctx, http.MethodPost, "/v1/volumes", req, &v)
	return v, err
}

// ResizeVolume grows a volume.
func (c *Client) ResizeVolume(ctx context.Context, name string, size int64) (Volume, error) {
	return c.ChangeVolume(ctx, name, VolumeChange{Size: size})
}

// RenameVolume gives a volume another name.
func (c *Client) RenameVolume(ctx context.Context, old, name string) (Volume, error) {
	return c.ChangeVolume(ctx, old, VolumeChange{Rename: name})
}

// ChangeVolume resizes or renames a volume, or changes what it shares.
func (c *Client) ChangeVolume(ctx context.Context, name string, ch VolumeChange) (v Volume, err error) {
	err = c.agent.call(ctx, http.MethodPatch, "/v1/volumes/"+url.PathEscape(name), ch, &v)
	return v, err
}

// DeleteVolume deletes a volume and what is in it.
func (c *Client) DeleteVolume(ctx context.Context, name string) error {
	return c.agent.call(ctx, http.MethodDelete, "/v1/volumes/"+url.PathEscape(name), nil, nil)
}

// Pools lists the pools of both identities, open or not.
func (c *Client) Pools(ctx context.Context) (p []Pool, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/pools", nil, &p)
	return p, err
}

// Pool describes one pool.
func (c *Client) Pool(ctx context.Context, name string) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/pools/"+url.PathEscape(name), nil, &p)
	return p, err
}

// CreatePool makes a pool for a guest that has none.
func (c *Client) CreatePool(ctx context.Context, req PoolCreate) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools", req, &p)
	return p, err
}

// AddDevice adds a device to a pool.
func (c *Client) AddDevice(ctx context.Context, pool string, req PoolAdd) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/devices", req, &p)
	return p, err
}

// ExportPool closes a pool, so that it can be taken elsewhere.
func (c *Client) ExportPool(ctx context.Context, pool string, req PoolExport) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/export", req, &p)
	return p, err
}

// ImportPool takes over a pool from elsewhere.
func (c *Client) ImportPool(ctx context.Context, req PoolImport) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/imports", req, &p)
	return p, err
}

// ChangeCopy takes a copy out or back, or replaces it.
func (c *Client) ChangeCopy(ctx context.Context, pool string, req CopyChange) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/copies", req, &p)
	return p, err
}

// RemoveDevice begins the removal of a device from a pool, or cancels one.
func (c *Client) RemoveDevice(ctx context.Context, pool string, req PoolRemove) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/removal", req, &p)
	return p, err
}

// ScrubPool begins, pauses, goes on with or ends the scrub of a pool.
func (c *Client) ScrubPool(ctx context.Context, pool string, req ScrubChange) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/scrub", req, &p)
	return p, err
}

// CheckTakeover says whether the partner could take over guest now.
func (c *Client) CheckTakeover(ctx context.Context, guest string) (t TakeoverCheck, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/guests/"+url.PathEscape(guest)+"/takeover", nil, &t)
	return t, err
}

// Takeover lets the partner take over guest and returns when it serves.
func (c *Client) Takeover(ctx context.Context, guest string) (t Takeover, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/guests/"+url.PathEscape(guest)+"/takeover", nil, &t)
	return t, err
}

// Giveback gives guest its identity back and returns when it serves.
func (c *Client) Giveback(ctx context.Context, guest string) (t Takeover, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/guests/"+url.PathEscape(guest)+"/giveback", nil, &t)
	return t, err
}

// Drill runs a fault drill on a guest: one of the Drill constants.
func (c *Client) Drill(ctx context.Context, guest, drill string) error {
	return c.agent.call(ctx, http.MethodPost, "/v1/guests/"+url.PathEscape(guest)+"/drill/"+url.PathEscape(drill), nil, nil)
}

// Check recounts all open pools. With nothing running it returns
// KindNotRunning, and the caller may check offline instead.
func (c *Client) Check(ctx context.Context) (CheckReport, error) {
	var r CheckReport
	err := c.agent.call(ctx, http.MethodPost, "/v1/check", nil, &r)
	if !c.fallback(err) {
		return r, err
	}
	parts, gerr := askGuests[CheckReport](ctx, c, http.MethodPost, "/v1/check")
	if gerr != nil {
		return r, errNothingRuns(c.dir)
	}
	r = CheckReport{OK: true, Online: true, Notes: []string{"the agent is not running: only pools of living guests were checked"}}
	for _, p := range parts {
		r.OK = r.OK && p.OK
		r.Pools = append(r.Pools, p.Pools...)
		r.Notes = append(r.Notes, p.Notes...)
	}
	return r, nil
}

// Checking tells how far the checks under way have come. It asks the guests
// themselves: they do the work, whoever asked for it.
func (c *Client) Checking(ctx context.Context) (all []CheckProgress, err error) {
	parts, err := askGuests[[]CheckProgress](ctx, c, http.MethodGet, "/v1/check")
	for _, p := range parts {
		all = append(all, p...)
	}
	return all, err
}

// Events calls f for each event, oldest first, and with q.Follow goes on
// until ctx ends or f returns an error.
func (c *Client) Events(ctx context.Context, q EventQuery, f func(Event) error) error {
	v := url.Values{}
	v.Set("after", strconv.FormatUint(q.After, 10))
	v.Set("last", strconv.Itoa(q.Last))
	if q.Follow {
		v.Set("follow", "1")
	}
	resp, err := c.agent.do(ctx, http.MethodGet, "/v1/events?"+v.Encode(), nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	dec := json.NewDecoder(resp.Body)
	for {
		var e Event
		if err := dec.Decode(&e); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return NewError(KindUnavailable, "the agent ended the stream of events: "+err.Error(), "")
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

// Down stops guests and agent cleanly and returns when the agent has done
// all but end itself.
func (c *Client) Down(ctx context.Context) error {
	return c.agent.call(ctx, http.MethodPost, "/v1/down", nil, nil)
}

// fallback tells whether err means that the guests should be asked.
func (c *Client) fallback(err error) bool {
	return err != nil && c.dir != "" && KindOf(err) == KindNotRunning
}

func errNothingRuns(dir string) error {
	return NewError(KindNotRunning, "nothing runs in "+dir, "start it with `pollux up --dir "+dir+"`")
}

// askGuests puts one question to all guests of the directory that live, in
// the order of their names. It fails when none does.
func askGuests[R any](ctx context.Context, c *Client, method, path string) ([]R, error) {
	socks, _ := filepath.Glob(GuestSocket(c.dir, "*"))
	sort.Strings(socks)
	var out []R
	for _, s := range socks {
		var r R
		g := dial(s)
		cctx, cancel := ctx, context.CancelFunc(func() {})
		if method == http.MethodGet {
			cctx, cancel = context.WithTimeout(ctx, 2*time.Second)
		}
		err := g.call(cctx, method, path, nil, &r)
		cancel()
		g.http.CloseIdleConnections()
		if err == nil {
			out = append(out, r)
		}
	}
	if len(out) == 0 {
		return nil, errNothingRuns(c.dir)
	}
	return out, nil
}

// conn is a client of one socket.
type conn struct {
	socket string
	http   *http.Client
}

func dial(socket string) *conn {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConns:    4,
		IdleConnTimeout: time.Minute,
	}
	return &conn{socket: socket, http: &http.Client{Transport: tr}}
}

func (c *conn) call(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if out == nil {
		out = &struct{}{}
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return NewError(KindInternal, fmt.Sprintf("answer of %s: %v", c.socket, err), "")
	}
	return nil
}

// do sends a request and returns a successful response or an error.
func (c *conn) do(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var rd io.Reader
	if in != nil {
		p, err := json.Marshal(in)
		if err != nil {
			return nil, NewError(KindInvalid, err.Error(), "")
		}
		rd = bytes.NewReader(p)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://pollux"+path, rd)
	if err != nil {
		return nil, NewError(KindInvalid, err.Error(), "")
	}
	resp, err := c.http.Do(req)
	if errors.Is(err, io.EOF) && method == http.MethodGet {
		// Whoever answered ends at this moment. Asking again is harmless, and
		// tells whether somebody else is there.
		resp, err = c.http.Do(req)
	}
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	p, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	var e Error
	if json.Unmarshal(p, &e) != nil || e.Kind == "" {
		return nil, NewError(KindInternal, fmt.Sprintf("%s answered %s: %s", c.socket, resp.Status, strings.TrimSpace(string(p))), "")
	}
	return nil, &e
}

func (c *conn) transportError(ctx context.Context, err error) error {
	var op *net.OpError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &op) && op.Op == "dial":
		if errors.Is(err, fs.ErrPermission) {
			return NewError(KindInvalid, "may not open "+c.socket, "run as the user that ran `pollux up`")
		}
		return NewError(KindNotRunning, "nothing answers at "+c.socket, "start it with `pollux up`")
	}
	return NewError(KindUnavailable, fmt.Sprintf("talk to %s: %v", c.socket, err), "")
}
