package server

import (
	"slices"
	"sync"
)

// index says which clients use an on-demand name.
type index struct {
	mu    sync.RWMutex
	names map[string]map[Client]struct{}
}

func (x *index) add(name string, c Client) {
	x.mu.Lock()
	defer x.mu.Unlock()
	clients := x.names[name]
	if clients == nil {
		clients = map[Client]struct{}{}
		if x.names == nil {
			x.names = map[string]map[Client]struct{}{}
		}
		x.names[name] = clients
	}
	clients[c] = struct{}{}
}

func (x *index) remove(name string, c Client) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if clients := x.names[name]; clients != nil {
		if delete(clients, c); len(clients) == 0 {
			delete(x.names, name)
		}
	}
}

// Subscribers returns the clients that are subscribed to an on-demand name now, sorted. A client is listed before its name
// is resolved: whoever first changes what Resolve answers, then asks for the subscribers, then refreshes them, misses none.
func (s *Server) Subscribers(name string) []Client {
	s.index.mu.RLock()
	defer s.index.mu.RUnlock()
	list := make([]Client, 0, len(s.index.names[name]))
	for c := range s.index.names[name] {
		list = append(list, c)
	}
	slices.Sort(list)
	return list
}

// SubscribedNames returns the on-demand names that any client is subscribed to now, sorted.
func (s *Server) SubscribedNames() []string {
	s.index.mu.RLock()
	defer s.index.mu.RUnlock()
	list := make([]string, 0, len(s.index.names))
	for name := range s.index.names {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}

// Subscriptions returns the on-demand names that one client is subscribed to now, sorted.
func (s *Server) Subscriptions(name Client) []string {
	c := s.lookup(name)
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []string
	if ts := c.types[ClusterType]; ts != nil {
		for _, e := range ts.entries {
			if e.explicit {
				list = append(list, e.name)
			}
		}
	}
	slices.Sort(list)
	return list
}
