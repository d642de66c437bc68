package netns

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sync"
)

// appMain is the process that stands for a pod's containers: probe server and client, told what to do over a socket pair. It ends with
// that socket.
func appMain() int {
	socket, err := inheritedSocket("commands")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a := &app{replies: json.NewEncoder(socket), running: map[int64]context.CancelFunc{}}
	for requests := json.NewDecoder(socket); ; {
		var r request
		if requests.Decode(&r) != nil {
			return 0
		}
		a.handle(ctx, r)
	}
}

type app struct {
	server *server // set by the first request

	mu      sync.Mutex
	replies *json.Encoder
	running map[int64]context.CancelFunc
}

func (a *app) handle(ctx context.Context, r request) {
	switch {
	case r.Serve != nil:
		s, err := serve(ctx, r.Serve)
		if err != nil {
			a.reply(reply{ID: r.ID, Error: err.Error()})
			return
		}
		a.server = s
		a.reply(reply{ID: r.ID})
	case r.Probe != nil:
		ctx, cancel := context.WithCancel(ctx)
		a.mu.Lock()
		a.running[r.ID] = cancel
		a.mu.Unlock()
		go func() {
			outcomes := tryAll(ctx, r.Probe)
			a.cancel(r.ID)
			a.reply(reply{ID: r.ID, Outcomes: outcomes})
		}()
	case r.Connections != nil:
		a.reply(reply{ID: r.ID, Connections: a.server.connections()})
	case r.Arrivals != nil:
		a.arrivals(r.ID)
	case r.Cancel != nil:
		a.cancel(r.Cancel.ID)
	}
}

func (a *app) arrivals(id int64) {
	got, err := a.server.arrivals()
	if err != nil {
		a.reply(reply{ID: id, Error: err.Error()})
		return
	}
	a.reply(reply{ID: id, Arrivals: got})
}

func (a *app) cancel(id int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if cancel := a.running[id]; cancel != nil {
		cancel()
		delete(a.running, id)
	}
}

// reply cannot fail in a way that matters: without its socket the process is about to end.
func (a *app) reply(r reply) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.replies.Encode(r)
}
