package host

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/pollux-storage/pollux/internal/metrics"
)

// serveMetrics answers monitoring at the address of the settings until the function
// that it returns is called.
func (a *agent) serveMetrics() (stop func(), err error) {
	address := a.settings().Metrics.Address
	if address == "" {
		return func() {}, nil
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics.address: %w", err)
	}
	srv := &http.Server{Handler: metrics.Handler(a.status, a.log), ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(ln) // its only error is that it was closed
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			_ = srv.Close() // a scrape that is still under way is cut
		}
		<-done
	}, nil
}
