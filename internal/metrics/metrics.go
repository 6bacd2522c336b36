// Package metrics tells a monitoring system how a pair is, in the text format of
// Prometheus, and whether it is healthy. It asks for the status once a scrape,
// as `pollux status` does, and keeps nothing.
package metrics

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pollux-storage/pollux/internal/control"
)

// limit bounds a scrape. A guest that hangs makes the status late, not wait.
const limit = 5 * time.Second

// Status tells how the pair is now.
type Status func(ctx context.Context) (control.Status, error)

// Handler serves /metrics and /healthz. Problems of scrapes go to log.
func Handler(status Status, log *slog.Logger) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(&collector{status: status, log: log},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m := http.NewServeMux()
	m.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{
		// Monitoring that asks faster than it is answered must not pile up.
		MaxRequestsInFlight: 2, Timeout: 2 * limit, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}))
	m.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { health(w, r, status) })
	return m
}

// Health is the answer of /healthz.
type Health struct {
	// Protected says that either guest may die now and nothing is lost.
	Protected bool `json:"protected"`
	// Problems are the alerts, and why the status cannot be had.
	Problems []string `json:"problems"`
}

// health answers 200 when the pair serves and is protected, and 503 otherwise.
func health(w http.ResponseWriter, r *http.Request, status Status) {
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	st, err := status(ctx)
	h := Health{Protected: err == nil && st.Protected, Problems: st.AllAlerts()}
	if err != nil {
		h.Problems = append(h.Problems, err.Error())
	}
	w.Header().Set("Content-Type", "application/json")
	if !h.Protected {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(h) // who has gone needs no answer
}
