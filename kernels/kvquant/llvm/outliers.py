class Outliers:
    def __init__(self, shape, a):
        pass

    def start(self, me):
        pass

    def add_to_scores(self, *a):
        pass

    def add_to_sums(self, *a):
        pass
