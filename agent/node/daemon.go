package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Config is what a daemon is told. All fields are required.
type Config struct {
	StateDir    string    // of State files
	KubeletRoot string    // the kubelet's --root-dir
	Binary      string    // mantlet-agent
	ChildLog    io.Writer // what children say
	Logger      *slog.Logger
}

// Daemon runs a child for each pod.
type Daemon struct {
	cfg Config

	children map[string]*child // by key
	ended    chan *child
	running  sync.WaitGroup
}

// child is a pod and what is run for it.
type child struct {
	pod
	cancel context.CancelFunc
}

// pod is one to be enforced.
type pod struct {
	key   string // container ID, or UID where the plugin was not there
	name  string // for a person
	uid   string
	netns string                   // path
	open  func() (*os.File, error) // opens its network namespace; an error that is os.ErrNotExist: it has gone
	found bool                     // by its sidecar, not told by the plugin
}

// lookEvery is how often pods are looked for that no plugin told of, and namespaces that have gone.
const lookEvery = time.Second

// Run enforces in pods until ctx ends (nil). Then the children are gone, and what they have written is still there.
func Run(ctx context.Context, cfg Config) error {
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the state folder: %w", err)
	}
	defer func() { _ = watcher.Close() }()
	if err := watcher.Add(cfg.StateDir); err != nil {
		return fmt.Errorf("watch the state folder %s: %w", cfg.StateDir, err)
	}
	d := &Daemon{cfg: cfg, children: map[string]*child{}, ended: make(chan *child)}
	ctx, cancel := context.WithCancel(ctx)
	defer d.running.Wait()
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for look := true; ; {
		d.settle(ctx, look)
		look = false
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			look = true
		case _, ok := <-watcher.Events:
			if !ok {
				return errors.New("the state folder is not watched any more")
			}
		case err := <-watcher.Errors: // events were lost: everything is looked at anyway
			cfg.Logger.Warn("node: watch the state folder", "error", err)
		case c := <-d.ended:
			if d.children[c.key] == c {
				delete(d.children, c.key)
			}
		}
	}
}

// settle starts and ends children until there is one for each pod.
func (d *Daemon) settle(ctx context.Context, look bool) {
	states, err := readStates(d.cfg.StateDir)
	if err != nil {
		d.cfg.Logger.Error("node: states that cannot be read; their pods stay as they are", "error", err)
	}
	wanted := map[string]bool{}
	told := map[string]bool{} // UIDs
	for _, s := range states {
		wanted[s.ContainerID], told[s.UID] = true, true
		d.start(ctx, pod{key: s.ContainerID, name: s.Namespace + "/" + s.Name, uid: s.UID, netns: s.Netns, open: func() (*os.File, error) { return openNetns(s.Netns) }})
	}
	for key, c := range d.children {
		switch {
		case c.found && !told[c.uid]:
		case !wanted[key]:
			c.cancel()
		case look && c.gone():
			d.forget(c)
		}
	}
	if look {
		for _, p := range d.look(told) {
			d.start(ctx, p)
		}
	}
}

// gone reports whether the pod's network namespace has gone. A child in it would keep it alive.
func (c *child) gone() bool {
	f, err := c.open()
	if err == nil {
		f.Close()
	}
	return errors.Is(err, os.ErrNotExist)
}

// forget ends a pod that went without a word.
func (d *Daemon) forget(c *child) {
	c.cancel()
	if c.found {
		return
	}
	if err := removeState(d.cfg.StateDir, c.key); err != nil {
		d.cfg.Logger.Error("node: the state of a pod that has gone stays", "pod", c.name, "error", err)
	}
}

// start starts a pod's child unless there is one.
func (d *Daemon) start(ctx context.Context, p pod) {
	if d.children[p.key] != nil {
		return
	}
	podCtx, cancel := context.WithCancel(ctx)
	c := &child{pod: p, cancel: cancel}
	d.children[p.key] = c
	d.running.Go(func() {
		defer cancel()
		d.supervise(podCtx, c)
		select {
		case d.ended <- c:
		case <-ctx.Done():
		}
	})
}

const (
	childPause    = 50 * time.Millisecond // before a child that failed is started again; doubled each time
	childPauseMax = 10 * time.Second
	childSteady   = time.Minute // a child that lived this long ended for a new reason
	childBrief    = time.Second // one whose agent went sooner is not started again at once
)

// supervise keeps a child running until ctx ends or the pod has gone.
func (d *Daemon) supervise(ctx context.Context, c *child) {
	log := d.cfg.Logger.With("pod", c.name)
	log.Info("node: enforcing", "netns", c.netns)
	defer log.Info("node: ended")
	for pause := childPause; ctx.Err() == nil; {
		began := time.Now()
		netns, err := c.open()
		if err == nil {
			err = runChild(ctx, d.cfg.Binary, netns, c.name, VolumePath(d.cfg.KubeletRoot, c.uid), d.cfg.ChildLog)
			netns.Close()
		}
		lived := time.Since(began)
		if lived > childSteady {
			pause = childPause
		}
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, os.ErrNotExist) && c.gone():
			d.forget(c)
			return
		case err == nil: // its agent has gone
			if c.found {
				return // the next look finds it again, perhaps in another sandbox
			}
			if lived > childBrief {
				continue
			}
		default:
			log.Error("node: the pod stays as it is until a child runs there again", "cause", err, "in", pause)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, childPauseMax)
	}
}

// look finds pods with an agent that waits for the daemon, of which no plugin told.
func (d *Daemon) look(told map[string]bool) (list []pod) {
	volumes, err := filepath.Glob(VolumePath(d.cfg.KubeletRoot, "*"))
	if err != nil {
		d.cfg.Logger.Error("node: look for pods", "error", err)
	}
	for _, volume := range volumes {
		uid := filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(volume))))
		if told[uid] || d.children[uid] != nil || !word.MatchString(uid) {
			continue
		}
		p, err := findByAgent(uid, volume)
		switch {
		case err == nil:
			list = append(list, p)
		case !errors.Is(err, os.ErrNotExist):
			d.cfg.Logger.Error("node: a pod's sidecar waits, and its network namespace cannot be told", "pod", uid, "error", err)
		}
	}
	return list
}
