package vm

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Kernel is a kernel of Debian, unpacked.
type Kernel struct {
	Image   string // to boot
	modules string // its directory
}

// FindKernel returns the kernel that scripts/deps has put into the cache of this
// user, or below the directory that POLLUX_VM_KERNEL names.
func FindKernel() (Kernel, error) {
	dir := os.Getenv("POLLUX_VM_KERNEL")
	if dir == "" {
		cache := os.Getenv("XDG_CACHE_HOME")
		if cache == "" {
			cache = os.Getenv("HOME") + "/.cache"
		}
		dir = filepath.Join(cache, "pollux", "vm-kernel")
	}
	images, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if len(images) == 0 {
		return Kernel{}, fmt.Errorf("%s: %w", dir, errNoKernel)
	}
	image := images[len(images)-1]
	k := Kernel{Image: image, modules: filepath.Join(dir, "lib/modules", strings.TrimPrefix(filepath.Base(image), "vmlinuz-"))}
	_, err := os.Stat(k.modules)
	return k, err
}

// module is one, ready to be loaded.
type module struct {
	name    string
	content []byte
}

// plain is how a module's name is compared: file names and what modules say of each
// other differ in these.
func plain(name string) string { return strings.ReplaceAll(name, "-", "_") }

// order returns the named modules with all that they depend on, each behind what
// it needs. What the kernel has built in is left out.
func (k Kernel) order(names []string) ([]module, error) {
	files := map[string]string{}
	err := filepath.WalkDir(k.modules, func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(d.Name(), ".ko"); err == nil && ok {
			files[plain(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for line := range strings.FieldsSeq(string(builtin)) {
		name, _, _ := strings.Cut(filepath.Base(line), ".ko")
		files[plain(name)] = ""
	}
	var out []module
	done := map[string]bool{}
	var add func(name, by string) error
	add = func(name, by string) error {
		name = plain(name)
		if done[name] {
			return nil
		}
		done[name] = true
		path, known := files[name]
		if !known {
			return fmt.Errorf("%s has no module %s, which %s needs", k.modules, name, by)
		}
		if path == "" {
			return nil
		}
		content, needs, err := readModule(path)
		if err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n, name); err != nil {
				return err
			}
		}
		out = append(out, module{name, content})
		return nil
	}
	for _, n := range names {
		if err := add(n, "the test"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readModule returns a module, unpacked, and what it says that it depends on.
func readModule(path string) (content []byte, needs []string, err error) {
	if strings.HasSuffix(path, ".xz") {
		content, err = exec.Command("xz", "-dc", path).Output()
	} else {
		content, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, nil, err
	}
	info := f.Section(".modinfo")
	if info == nil {
		return nil, nil, fmt.Errorf("no section .modinfo")
	}
	text, err := info.Data()
	if err != nil {
		return nil, nil, err
	}
	for line := range strings.SplitSeq(string(text), "\x00") {
		if list, ok := strings.CutPrefix(line, "depends="); ok && list != "" {
			needs = strings.Split(list, ",")
		}
	}
	return content, needs, nil
}
