package config

import (
	"fmt"
	"net/url"
	"path/filepath"
)

// VhostUser are the settings of the sockets at which virtual machines attach to volumes.
type VhostUser struct {
	// Off makes no such sockets.
	Off bool `yaml:"off" json:"off,omitempty"`
	// Dir is where they are, in a directory for each identity. Default DIR/vhost.
	Dir string `yaml:"dir" json:"dir"`
	// Queues is how many a machine may use at a volume. Default 16.
	Queues int `yaml:"queues" json:"queues"`
}

// MaxVhostQueues is the most queues of a machine at a volume.
const MaxVhostQueues = 64

func (v *VhostUser) setDefaults(dir string) {
	if or(&v.Dir, "vhost"); !filepath.IsAbs(v.Dir) {
		v.Dir = filepath.Join(dir, v.Dir)
	}
	or(&v.Queues, 16)
}

func (v *VhostUser) validate() error {
	if v.Queues < 1 || v.Queues > MaxVhostQueues {
		return fmt.Errorf("vhost_user.queues: %d; 1 to %d are possible", v.Queues, MaxVhostQueues)
	}
	return nil
}

// VhostDir is where the sockets of an identity's volumes are.
func (c *Config) VhostDir(identity string) string { return filepath.Join(c.VhostUser.Dir, identity) }

// VhostSocket is the socket at which virtual machines attach to a volume. It is an error
// if the path is longer than the system allows for one.
func (c *Config) VhostSocket(identity, volume string) (string, error) {
	// A name that a pool from elsewhere has brought may have anything in it.
	path := filepath.Join(c.VhostDir(identity), url.PathEscape(volume)+".sock")
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("the path of its socket, %s, has %d bytes, and the system allows %d: set vhost_user.dir to a shorter directory, or rename the volume", path, len(path), maxSocketPath)
	}
	return path, nil
}
