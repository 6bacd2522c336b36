package metrics

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pollux-storage/pollux/internal/control"
)

// Text returns what /metrics tells of a status, without what it tells of the agent's own
// process, for those who have a status and no agent to ask.
func Text(st control.Status) ([]byte, error) {
	r := prometheus.NewRegistry()
	r.MustRegister(&collector{status: func(context.Context) (control.Status, error) { return st, nil }, log: slog.New(slog.DiscardHandler)})
	req, err := http.NewRequest(http.MethodGet, "/metrics", nil)
	if err != nil {
		return nil, err
	}
	a := answer{header: http.Header{}, status: http.StatusOK}
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(&a, req)
	if a.status != http.StatusOK {
		return nil, fmt.Errorf("metrics: %s", a.body.String())
	}
	return a.body.Bytes(), nil
}

// answer keeps what a handler answers.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(p []byte) (int, error) { return a.body.Write(p) }
