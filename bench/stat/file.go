package stat

import (
	"encoding/json"
	"os"
	"path/filepath"
)

// WriteJSON writes what was measured to a file, and makes the folder that it is in.
func WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
