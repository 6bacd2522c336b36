package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// maxBody is the most that a request's body may hold.
const maxBody = 1 << 20

// Handlers are the functions behind a control socket. A nil one is answered
// with KindUnsupported. They may be called concurrently.
type Handlers struct {
	Status            func(ctx context.Context) (Status, error)
	Volumes           func(ctx context.Context) ([]Volume, error)
	Volume            func(ctx context.Context, name string) (Volume, error)
	CreateVolume      func(ctx context.Context, c VolumeCreate) (Volume, error)
	ChangeVolume      func(ctx context.Context, name string, c VolumeChange) (Volume, error)
	DeleteVolume      func(ctx context.Context, name string) error
	Pools             func(ctx context.Context) ([]Pool, error)
	Pool              func(ctx context.Context, name string) (Pool, error)
	CreatePool        func(ctx context.Context, c PoolCreate) (Pool, error)
	AddDevice         func(ctx context.Context, pool string, c PoolAdd) (Pool, error)
	ExportPool        func(ctx context.Context, pool string, c PoolExport) (Pool, error)
	ImportPool        func(ctx context.Context, c PoolImport) (Pool, error)
	RemoveDevice      func(ctx context.Context, pool string, c PoolRemove) (Pool, error)
	ChangeCopy        func(ctx context.Context, pool string, c CopyChange) (Pool, error)
	ChangePool        func(ctx context.Context, pool string, c PoolChange) (Pool, error)
	ScrubPool         func(ctx context.Context, pool string, c ScrubChange) (Pool, error)
	SurveyPool        func(ctx context.Context, pool string, c SurveyChange) (PoolDedup, error)
	Dedup             func(ctx context.Context) ([]PoolDedup, error)
	Flash             func(ctx context.Context, pool string) (PoolFlash, error)
	FlashPolicy       func(ctx context.Context, pool string) (FlashPolicy, error)
	ChangeFlashPolicy func(ctx context.Context, pool string, c FlashPolicyChange) (FlashPolicy, error)
	ChangeFlashPin    func(ctx context.Context, volume string, c FlashPinChange) (PoolFlash, error)
	EvacuateFlash     func(ctx context.Context, pool string, e FlashEvacuation) (PoolFlash, error)
	ExplainFlash      func(ctx context.Context, volume string, at FlashPlace) (FlashExplanation, error)
	SimulateFlash     func(ctx context.Context, pool string, t FlashTrial) (FlashPrediction, error)
	CheckTakeover     func(ctx context.Context, guest string) (TakeoverCheck, error)
	Takeover          func(ctx context.Context, guest string) (Takeover, error)
	Giveback          func(ctx context.Context, guest string) (Takeover, error)
	CheckUpgrade      func(ctx context.Context, r UpgradeRequest) (UpgradeCheck, error)
	StartUpgrade      func(ctx context.Context, r UpgradeRequest) (Programs, error)
	Programs          func(ctx context.Context) (Programs, error)
	Drill             func(ctx context.Context, guest, drill string) error
	Check             func(ctx context.Context) (CheckReport, error)
	Checking          func(ctx context.Context) ([]CheckProgress, error)
	// Events calls emit for each event until there is none left, or, when
	// following, until ctx ends or emit returns an error.
	Events func(ctx context.Context, q EventQuery, emit func(Event) error) error
	Down   func(ctx context.Context) error
}

// Server answers on a control socket.
type Server struct {
	http *http.Server
	ln   net.Listener
	done chan struct{}
}

// Serve answers on ln until Close. It takes over ln.
func Serve(ln net.Listener, h Handlers) *Server {
	base, stop := context.WithCancel(context.Background())
	s := &Server{ln: ln, done: make(chan struct{})}
	s.http = &http.Server{
		Handler:           h.mux(),
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return base },
	}
	s.http.RegisterOnShutdown(stop) // followers of events end at once
	go func() {
		defer close(s.done)
		_ = s.http.Serve(ln) // its only error is that it was closed
	}()
	return s
}

// Close stops the server, giving requests in flight until ctx ends.
func (s *Server) Close(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		_ = s.http.Close()
	}
	<-s.done
	return err
}

func (h Handlers) mux() *http.ServeMux {
	m := http.NewServeMux()
	m.HandleFunc("GET /v1/status", get(h.Status))
	m.HandleFunc("GET /v1/volumes", get(h.Volumes))
	m.HandleFunc("POST /v1/volumes", post(h.CreateVolume))
	m.HandleFunc("GET /v1/volumes/{name}", getNamed(h.Volume))
	m.HandleFunc("PATCH /v1/volumes/{name}", postNamed(h.ChangeVolume))
	m.HandleFunc("DELETE /v1/volumes/{name}", doNamed(h.DeleteVolume))
	m.HandleFunc("GET /v1/pools", get(h.Pools))
	m.HandleFunc("POST /v1/pools", post(h.CreatePool))
	m.HandleFunc("GET /v1/pools/{name}", getNamed(h.Pool))
	m.HandleFunc("PATCH /v1/pools/{name}", postNamed(h.ChangePool))
	m.HandleFunc("POST /v1/pools/{name}/devices", postNamed(h.AddDevice))
	m.HandleFunc("POST /v1/pools/{name}/export", postNamed(h.ExportPool))
	m.HandleFunc("POST /v1/imports", post(h.ImportPool))
	m.HandleFunc("POST /v1/pools/{name}/removal", postNamed(h.RemoveDevice))
	m.HandleFunc("POST /v1/pools/{name}/copies", postNamed(h.ChangeCopy))
	m.HandleFunc("POST /v1/pools/{name}/scrub", postNamed(h.ScrubPool))
	m.HandleFunc("POST /v1/pools/{name}/survey", postNamed(h.SurveyPool))
	m.HandleFunc("GET /v1/dedup", get(h.Dedup))
	m.HandleFunc("GET /v1/pools/{name}/flash", getNamed(h.Flash))
	m.HandleFunc("GET /v1/pools/{name}/flash/policy", getNamed(h.FlashPolicy))
	m.HandleFunc("PATCH /v1/pools/{name}/flash/policy", postNamed(h.ChangeFlashPolicy))
	m.HandleFunc("POST /v1/pools/{name}/flash/evacuation", postNamed(h.EvacuateFlash))
	m.HandleFunc("POST /v1/pools/{name}/flash/simulation", postNamed(h.SimulateFlash))
	m.HandleFunc("POST /v1/volumes/{name}/flash/pins", postNamed(h.ChangeFlashPin))
	m.HandleFunc("POST /v1/volumes/{name}/flash/explanation", postNamed(h.ExplainFlash))
	m.HandleFunc("GET /v1/guests/{name}/takeover", getNamed(h.CheckTakeover))
	m.HandleFunc("POST /v1/guests/{name}/takeover", getNamed(h.Takeover))
	m.HandleFunc("POST /v1/guests/{name}/giveback", getNamed(h.Giveback))
	m.HandleFunc("POST /v1/guests/{name}/drill/{drill}", h.drill)
	m.HandleFunc("POST /v1/upgrade/check", post(h.CheckUpgrade))
	m.HandleFunc("POST /v1/upgrade", post(h.StartUpgrade))
	m.HandleFunc("GET /v1/upgrade", get(h.Programs))
	m.HandleFunc("POST /v1/check", get(h.Check))
	m.HandleFunc("GET /v1/check", get(h.Checking))
	m.HandleFunc("GET /v1/events", h.events)
	m.HandleFunc("POST /v1/down", h.down)
	m.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		reply(w, nil, NewError(KindUnsupported, fmt.Sprintf("no such request: %s %s", r.Method, r.URL.Path), ""))
	})
	return m
}

var errNoHandler = NewError(KindUnsupported, "this socket does not answer such requests", "ask the agent's socket")

func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		e := AsError(err)
		w.WriteHeader(httpStatus(e.Kind))
		v = e
	}
	_ = json.NewEncoder(w).Encode(v) // a client that has gone needs no answer
}

func body(r *http.Request, v any) error {
	p, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil {
		return NewError(KindInvalid, "read the request: "+err.Error(), "")
	}
	if len(p) > maxBody {
		return NewError(KindInvalid, "the request is too large", "")
	}
	if err := json.Unmarshal(p, v); err != nil {
		return NewError(KindInvalid, "the request is not what was expected: "+err.Error(), "")
	}
	return nil
}

func get[R any](f func(context.Context) (R, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if f == nil {
			reply(w, nil, errNoHandler)
			return
		}
		v, err := f(r.Context())
		reply(w, v, err)
	}
}

func post[B, R any](f func(context.Context, B) (R, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if f == nil {
			reply(w, nil, errNoHandler)
			return
		}
		var b B
		if err := body(r, &b); err != nil {
			reply(w, nil, err)
			return
		}
		v, err := f(r.Context(), b)
		reply(w, v, err)
	}
}

func getNamed[R any](f func(context.Context, string) (R, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if f == nil {
			reply(w, nil, errNoHandler)
			return
		}
		v, err := f(r.Context(), r.PathValue("name"))
		reply(w, v, err)
	}
}

func postNamed[B, R any](f func(context.Context, string, B) (R, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if f == nil {
			reply(w, nil, errNoHandler)
			return
		}
		var b B
		if err := body(r, &b); err != nil {
			reply(w, nil, err)
			return
		}
		v, err := f(r.Context(), r.PathValue("name"), b)
		reply(w, v, err)
	}
}

func doNamed(f func(context.Context, string) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if f == nil {
			reply(w, nil, errNoHandler)
			return
		}
		reply(w, struct{}{}, f(r.Context(), r.PathValue("name")))
	}
}

func (h Handlers) drill(w http.ResponseWriter, r *http.Request) {
	if h.Drill == nil {
		reply(w, nil, errNoHandler)
		return
	}
	reply(w, struct{}{}, h.Drill(r.Context(), r.PathValue("name"), r.PathValue("drill")))
}

func (h Handlers) down(w http.ResponseWriter, r *http.Request) {
	if h.Down == nil {
		reply(w, nil, errNoHandler)
		return
	}
	reply(w, struct{}{}, h.Down(r.Context()))
}

// events streams one JSON object a line, so that a reader needs no framing
// and `curl --unix-socket` shows something useful.
func (h Handlers) events(w http.ResponseWriter, r *http.Request) {
	if h.Events == nil {
		reply(w, nil, errNoHandler)
		return
	}
	var q EventQuery
	q.After, _ = strconv.ParseUint(r.FormValue("after"), 10, 64)
	q.Last, _ = strconv.Atoi(r.FormValue("last"))
	q.Follow = r.FormValue("follow") == "1"
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	if q.Follow {
		w.WriteHeader(http.StatusOK)
		_ = rc.Flush()
	}
	enc := json.NewEncoder(w)
	err := h.Events(r.Context(), q, func(e Event) error {
		if err := enc.Encode(e); err != nil {
			return err
		}
		if q.Follow {
			return rc.Flush()
		}
		return nil
	})
	if err != nil && !errors.Is(err, context.Canceled) && !q.Follow {
		reply(w, nil, err)
	}
}
