package netns

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// host is what a pod and an outside have in common: a network namespace with a link to the node, a probe process, and whatever else runs
// in it.
type host struct {
	network *Network
	name    string
	ns      *os.File
	link    string // the node's end of the veth pair

	app     *Process
	appLog  tail
	socket  *os.File
	readEnd chan struct{} // closed when no reply can come any more

	sendMu sync.Mutex // apart from mu: replies have to be taken while a long request is being sent
	send   *json.Encoder

	mu      sync.Mutex
	lastID  int64
	waiting map[int64]chan reply

	processes processList
}

// Name is "namespace/name" of a pod, the CIDR of an outside.
func (h *host) Name() string { return h.name }

// Interface is the node's end of the link, for example "p7".
func (h *host) Interface() string { return h.link }

// Do runs f on a thread in the network namespace and returns its error. Sockets that f opens stay in the namespace when f has returned.
// f must not leave opening them to goroutines that it starts: they run elsewhere. (net.Dial and net.Listen open theirs in the calling
// goroutine as long as the address is one literal IP address.)
func (h *host) Do(f func() error) error { return inNamespace(h.ns, f) }

// Start runs a program in the network namespace. It is killed when ctx ends, when its pod or the network is closed, and with the enclosure.
func (h *host) Start(ctx context.Context, c Command) (*Process, error) {
	return h.processes.start(ctx, h.ns, c, h.network.enclosure.SingleUID)
}

// startApp starts the probe process and waits until it listens.
func (h *host) startApp(ctx context.Context, ports []Port) error {
	socket, theirs, err := socketPair(h.name)
	if err != nil {
		return err
	}
	defer func() { _ = theirs.Close() }()
	// Not bound to ctx, which is for starting only.
	h.app, err = h.processes.start(context.WithoutCancel(ctx), h.ns, Command{
		Path: "/proc/self/exe", Name: roleApp, Args: []string{h.name},
		Stderr: &h.appLog, ExtraFiles: []*os.File{theirs}, User: App,
	}, h.network.enclosure.SingleUID)
	if err != nil {
		_ = socket.Close()
		return err
	}
	h.socket, h.send = socket, json.NewEncoder(socket)
	h.waiting, h.readEnd = map[int64]chan reply{}, make(chan struct{})
	go h.readReplies()
	if _, err := h.call(ctx, request{Serve: &serveRequest{Name: h.name, Ports: ports}}); err != nil {
		return fmt.Errorf("start the probe server of %s: %w", h.name, err)
	}
	return nil
}

func (h *host) readReplies() {
	defer close(h.readEnd)
	for replies := json.NewDecoder(h.socket); ; {
		var r reply
		if replies.Decode(&r) != nil {
			return
		}
		h.mu.Lock()
		to := h.waiting[r.ID]
		delete(h.waiting, r.ID)
		h.mu.Unlock()
		if to != nil {
			to <- r // has room for it
		}
	}
}

// call asks the probe process something. When ctx ends it tells the process to leave off and returns ctx's error.
func (h *host) call(ctx context.Context, r request) (reply, error) {
	answer := make(chan reply, 1)
	h.mu.Lock()
	h.lastID++
	r.ID = h.lastID
	h.waiting[r.ID] = answer
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.waiting, r.ID)
		h.mu.Unlock()
	}()
	if err := h.tell(r); err != nil {
		return reply{}, h.appEnded()
	}
	select {
	case got := <-answer:
		return got, got.failure()
	case <-h.readEnd:
		select {
		case got := <-answer: // its last words
			return got, got.failure()
		default:
			return reply{}, h.appEnded()
		}
	case <-ctx.Done():
		_ = h.tell(request{Cancel: &cancelRequest{ID: r.ID}})
		return reply{}, ctx.Err()
	}
}

func (h *host) tell(r request) error {
	h.sendMu.Lock()
	defer h.sendMu.Unlock()
	return h.send.Encode(r)
}

func (r reply) failure() error {
	if r.Error != "" {
		return errors.New(r.Error)
	}
	return nil
}

func (h *host) appEnded() error {
	h.app.Kill() // it is of no use without its socket; Wait must not block
	ending := "with exit code 0"
	if err := h.app.Wait(); err != nil {
		ending = err.Error()
	}
	return fmt.Errorf("the probe process of %s has ended: %s %s", h.name, ending, h.appLog.String())
}

// Probe tries targets from the network namespace, Config.ProbesInFlight at a time, and returns one outcome for each, in their order.
// A target that cannot be reached is an outcome, not an error.
func (h *host) Probe(ctx context.Context, targets []Target) ([]Outcome, error) {
	r, err := h.network.probeRequest(targets)
	if err != nil || len(targets) == 0 {
		return nil, err
	}
	got, err := h.call(ctx, request{Probe: r})
	if err == nil && len(got.Outcomes) != len(targets) {
		err = fmt.Errorf("%d outcomes of %d tries", len(got.Outcomes), len(targets))
	}
	if err != nil {
		return nil, fmt.Errorf("probe from %s: %w", h.name, err)
	}
	return got.Outcomes, nil
}

// Connections tells what the probe server has accepted since it started, by port and client address.
func (h *host) Connections(ctx context.Context) ([]Connections, error) {
	got, err := h.call(ctx, request{Connections: &struct{}{}})
	if err != nil {
		return nil, fmt.Errorf("ask %s for its connections: %w", h.name, err)
	}
	return got.Connections, nil
}

// Arrivals returns the datagrams of probes that have reached the probe server since it was last asked. What is still on its way is not
// among them: see Network.Fence.
func (h *host) Arrivals(ctx context.Context) (*Arrivals, error) {
	got, err := h.call(ctx, request{Arrivals: &struct{}{}})
	if err != nil {
		return nil, fmt.Errorf("ask %s for its datagrams: %w", h.name, err)
	}
	if got.Arrivals == nil {
		return nil, fmt.Errorf("ask %s for its datagrams: no answer", h.name)
	}
	return got.Arrivals, nil
}

// end kills what runs in the host and waits for it.
func (h *host) end() {
	h.processes.end()
	if h.socket != nil {
		_ = h.socket.Close()
		<-h.readEnd
	}
}

// inode identifies the network namespace.
func (h *host) inode() (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(h.ns.Fd()), &stat); err != nil {
		return 0, fmt.Errorf("look at network namespace %s: %w", h.name, err)
	}
	return stat.Ino, nil
}

// processList holds the processes of one host.
type processList struct {
	mu    sync.Mutex
	ended bool
	all   map[*Process]struct{}
	wait  sync.WaitGroup
}

func (l *processList) start(ctx context.Context, ns *os.File, c Command, single bool) (*Process, error) {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return nil, fmt.Errorf("start %s in %s: it is closed", c.Path, ns.Name())
	}
	l.wait.Add(1) // under the lock, so that end waits also for a start that is under way
	l.mu.Unlock()
	p, err := start(ctx, ns, c, single)
	if err != nil {
		l.wait.Done()
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[*Process]struct{}{}
	}
	l.all[p] = struct{}{}
	if l.ended {
		p.Kill()
	}
	go func() {
		<-p.done
		l.mu.Lock()
		delete(l.all, p)
		l.mu.Unlock()
		l.wait.Done()
	}()
	return p, nil
}

func (l *processList) end() {
	l.mu.Lock()
	l.ended = true
	for p := range l.all {
		p.Kill()
	}
	l.mu.Unlock()
	l.wait.Wait()
}

// tail keeps the last bytes written to it.
type tail struct {
	mu  sync.Mutex
	end []byte
}

const tailBytes = 4096

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end = append(t.end, b...)
	if extra := len(t.end) - tailBytes; extra > 0 {
		t.end = t.end[extra:]
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.end))
}
