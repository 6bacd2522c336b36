package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
)

// mostStacks is how much is written of a guest's goroutines; each takes about 1 KiB.
const mostStacks = 512 << 10

// wordsLimit bounds the wait for the disk that last words are written to: whoever takes
// over shall not wait for them.
const wordsLimit = 2 * time.Second

// lastWords is the file of this run for what a guest writes as it dies. The runtime writes
// there, beside the log, what it has to say of a panic or a fatal signal; a log may have
// been cut when somebody looks. A guest that ends in good order removes it.
type lastWords struct {
	path string
	log  *slog.Logger
	mu   sync.Mutex // held while somebody writes
}

// newLastWords makes the runtime write to the file, which whoever starts guests has made.
func newLastWords(log *slog.Logger, dir, name string, inc uint64) *lastWords {
	debug.SetTraceback("all")
	w := &lastWords{log: log, path: config.LastWordsPath((&config.Config{Dir: dir}).RunDir(), name, inc)}
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		err = errors.Join(debug.SetCrashOutput(f, debug.CrashOptions{}), f.Close())
	}
	if err != nil {
		log.Warn("what this guest would write as it dies is in its log only", "error", err)
	}
	return w
}

// write replaces what is in the file by the reason and all goroutines, or by nothing.
func (w *lastWords) write(reason string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if reason == "" {
		return os.Truncate(w.path, 0)
	}
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_APPEND|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	buf := make([]byte, mostStacks)
	_, err = fmt.Fprintf(f, "%s: %s\n\n%s\n", time.Now().UTC().Format(time.RFC3339Nano), reason, buf[:runtime.Stack(buf, true)])
	return errors.Join(err, f.Close())
}

// stalled leaves word of a guest that may be fenced at any moment, or takes it back.
func (w *lastWords) stalled(reason string) {
	if reason != "" {
		w.log.Warn("guest stands still", "reason", reason)
	}
	if err := w.write(reason); err != nil {
		w.log.Warn("last words", "error", err)
	}
}

// stuck leaves word of a guest that is about to end itself. A disk that takes no words
// does not keep it.
func (w *lastWords) stuck(reason string) {
	done := make(chan error, 1)
	go func() { done <- w.write(reason) }()
	select {
	case err := <-done:
		if err != nil {
			w.log.Warn("last words", "error", err)
		}
	case <-time.After(wordsLimit):
	}
}

// remove says that the guest ends in good order.
func (w *lastWords) remove() { _ = os.Remove(w.path) }
